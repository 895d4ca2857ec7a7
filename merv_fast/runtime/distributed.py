"""Encoders spread over processes, each with its own projectors; what is exchanged is one sum of tokens.

A rank weighs its own encoders among themselves. With L_r the logarithm of the sum of their exponential scores, the
whole is a sum over ranks,

    tokens = sum_r z_r tokens_r        w_e = z_r w_re  of its rank r        z_r = exp(L_r - log sum_r exp(L_r))

so that no rank needs another's encoders, projectors or features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from merv_fast.modules.fusion import WeighingFusion
from merv_fast.ops import fuse_encoders
from merv_fast.runtime.concurrent import ConcurrentEncoders, share_out

__all__ = ["RankedEncoders", "fuse_over_ranks"]


class RankedEncoders:
    """Encoders, projectors and fusion on the ranks of a process group: every rank gets the whole result.

    Build it on every rank from the same model; a rank uses, and need only hold, its `members`.

    Args:
        encoders: E modules from a prepared input to tokens ``[B, T_e, N_e, C_e]``.
        projectors: E modules from those to ``[B, S, D]``.
        fusion: a weighted sum of the encoders.
        costs: of each encoder; by parameters if not given. Must be the same on every rank.
        group: the process group; the default one if not given.

    Raises:
        ValueError: there are more ranks than encoders, or not as many projectors as encoders.
    """

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        projectors: Sequence[Callable[[Tensor], Tensor]],
        fusion: WeighingFusion,
        *,
        costs: Sequence[float] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        ranks = dist.get_world_size(group)
        if ranks > len(encoders):
            raise ValueError(f"RankedEncoders: ranks must be at most {len(encoders)}, the encoders, got {ranks}")
        if len(projectors) != len(encoders):
            raise ValueError(f"RankedEncoders: projectors must be {len(encoders)}, got {len(projectors)}")
        costs = costs or [float(sum(p.numel() for p in encoder.parameters())) for encoder in encoders]
        self.members = share_out(costs, ranks)[dist.get_rank(group)]
        self._run = ConcurrentEncoders([encoders[member] for member in self.members])
        self._projectors = [projectors[member] for member in self.members]
        self._fusion, self._group = fusion, group

    def __call__(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, S, D]`` and encoder weights ``[B, E]``, the same on every rank.

        Args:
            inputs: E prepared inputs; those of other ranks' encoders are not looked at and may be None.
        """
        own = [inputs[member] for member in self.members]
        if missing := [member for member, x in zip(self.members, own, strict=True) if x is None]:
            raise ValueError(f"RankedEncoders: inputs[{missing[0]}] must be a tensor on this rank, got None")
        features = self._run([x for x in own if x is not None])
        values = [projector(x) for projector, x in zip(self._projectors, features, strict=True)]
        return fuse_over_ranks(values, self.members, self._fusion, self._group)


def fuse_over_ranks(
    values: Sequence[Tensor], members: Sequence[int], fusion: WeighingFusion, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """The fusion of all ranks' values.

    Args:
        values: of this rank's encoders, at least one, each ``[B, S, D]``.
        members: which encoders those are; over all ranks every encoder once.
        fusion: with the same parameters on every rank.
        group: the process group; the default one if not given.

    Returns:
        As `fuse_encoders`: ``tokens [B, S, D]`` and ``encoder_weights [B, E]``, the same on every rank.

    Raises:
        ValueError: on every rank, if an encoder is on none or on several.
    """
    query, bias = fusion.folded(values[0].dtype)
    bias = bias[list(members)]
    tokens, own = fuse_encoders(values, query, bias)
    exact = torch.promote_types(tokens.dtype, torch.float32)
    means = torch.stack([value.to(exact).mean(1) for value in values], 1)
    scores = means @ query.to(exact) + bias.to(exact)
    sums = [torch.empty_like(scores[:, 0]) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sums, scores.logsumexp(1), group=group)
    share = (scores.logsumexp(1) - torch.stack(sums).logsumexp(0)).exp()
    weights = own.new_zeros(len(own) + 1, fusion.encoders)
    weights[:-1, list(members)] = own * share[:, None]
    weights[-1, list(members)] += 1
    dist.all_reduce(weights, group=group)
    if (weights[-1] != 1).any():
        counts = [int(count) for count in weights[-1].tolist()]
        raise ValueError(f"fuse_over_ranks: members must hold every encoder once over all ranks, got {counts}")
    total = tokens.to(exact) * share[:, None, None]
    dist.all_reduce(total, group=group)
    return total.to(tokens.dtype), weights[:-1]
