"""Encoders spread over processes, each with its own projectors; what is exchanged is scores and one sum of tokens.

A rank weighs its own encoders among themselves. With w the softmax of the scores of all encoders, the whole is a sum
over ranks,

    tokens = sum_r z_r tokens_r        z_r = the sum of w_e over the encoders of rank r

so that no rank needs another's encoders, projectors or features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from merv_fast import ops
from merv_fast.modules.fusion import WeighingFusion
from merv_fast.modules.projectors import PooledProjector, Projector
from merv_fast.modules.tail import Tail, find_obstacle
from merv_fast.ops._autocast import without_autocast
from merv_fast.ops._hidden_layers import hidden_layers
from merv_fast.runtime.concurrent import ConcurrentEncoders, share_out
from merv_fast.runtime.exchange import Exchange, Part

__all__ = ["RankedEncoders"]

Projecting = Callable[[Tensor], Tensor]
Held = TypeVar("Held")


class RankedEncoders:
    """Encoders, projectors and fusion on the ranks of a process group: every rank gets the whole result.

    Build it on every rank from the same model: ``RankedEncoders(video_model.encoders, video_model.tail)``. A rank uses,
    and need only hold, the encoders and projectors that are its `members`, and the fusion. Then call it on every rank
    for every request, in the same order. There are no gradients.

    What fails on one rank before tokens are exchanged fails on all: that rank raises its own error, the others say
    which it was, and all are ready for the next request. So a rank that cannot even prepare its inputs has to call as
    well, with None for them. When a rank is gone, the others wait as long as their group does.

    Args:
        encoders: E modules from a prepared input to tokens ``[B, T_e, N_e, C_e]``; by name, or a sequence. Those of
            other ranks may be None or without weights, on the ``meta`` device.
        tail: what makes of those the visual tokens: a `Tail`; or E projectors, functions to ``[B, S, D]``, with a
            weighted sum of the encoders. Projectors of other ranks are not looked at.
        costs: of each encoder; by parameters if not given. Must be the same on every rank.
        group: the process group; the default one if not given.

    Attributes:
        members: this rank's encoders.
        obstacle: why their tail is not one matrix product (`ops.pool_project_fuse`), but projects each encoder by
            itself; None where it is.

    Raises:
        ValueError: there are more ranks than encoders, or this process is on none; not as many projectors or costs as
            encoders; a fusion that is no weighted sum; an encoder that is absent although it is a member, or although
            costs are not given.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from merv_fast.modules import build_fusion, build_projector
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> projectors = [build_projector("avg+linear", 6, 8, 4, slots=2, grid=(3, 3)) for _ in range(2)]
        >>> tail = Tail(projectors, build_fusion("scalar", 2, llm_width=8))
        >>> ranked = RankedEncoders([torch.nn.Linear(5, 6), torch.nn.Linear(5, 6)], tail)
        >>> tokens, encoder_weights = ranked([torch.zeros(1, 2, 9, 5)] * 2)
        >>> tokens.shape, encoder_weights.shape
        (torch.Size([1, 8, 8]), torch.Size([1, 2]))
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module | None] | nn.ModuleDict | Sequence[nn.Module | None],
        tail: Tail | tuple[Sequence[Projecting | None], WeighingFusion],
        *,
        costs: Sequence[float] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        modules = list(encoders.values() if isinstance(encoders, (Mapping, nn.ModuleDict)) else encoders)
        projectors, fusion = (list(tail.projectors), tail.fusion) if isinstance(tail, Tail) else tail
        ranks = dist.get_world_size(group)
        if not 1 <= ranks <= len(modules):
            raise ValueError(f"RankedEncoders: ranks must be 1 to {len(modules)}, the encoders, got {ranks}")
        if not isinstance(fusion, WeighingFusion):
            raise ValueError(f"RankedEncoders: fusion must be a weighted sum, got {type(fusion).__name__}")
        fusion.check_encoders(modules)
        costs = costs_of(modules) if costs is None else costs
        for name, items in (("projectors", projectors), ("costs", costs)):
            if len(items) != len(modules):
                raise ValueError(f"RankedEncoders: {name} must be {len(modules)}, got {len(items)}")
        self.members = share_out(costs, ranks)[dist.get_rank(group)]
        self._run = ConcurrentEncoders(held("encoders", modules, self.members))
        self._projectors: list[Projecting] = held("projectors", projectors, self.members)
        self._fusion = fusion
        self._length = tail.output_tokens if isinstance(tail, Tail) else 1
        self._exchange = Exchange(self.members, len(modules), group)
        self.obstacle = find_obstacle(cast(Sequence[Projector], self._projectors), fusion)

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor | None], request: int | None = None) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, S, D]`` and encoder weights ``[B, E]``, the same on every rank.

        Args:
            inputs: E prepared inputs; those of other ranks' encoders are not looked at and may be None.
            request: a number below 2**53 by which ranks can tell that they answer the same one; counted from 1 if not
                given.

        Raises:
            RuntimeError: on the other ranks, if the request fails on one; on all, if their requests differ.
            ValueError: where an input is missing; on all, if shapes or dtypes of their tokens differ, or an encoder is
                on none or on several of them.
            Exception: where encoders, projectors or fusion raise.
        """
        self._exchange.begin(request, next(self._fusion.parameters()).device)
        try:
            part = self._part(inputs)
        except Exception:
            self._exchange.give_up()
            raise
        return self._exchange.add(part)

    def _part(self, inputs: Sequence[Tensor | None]) -> Part:
        """What this rank adds to the sum."""
        if len(inputs) != self._fusion.encoders:
            raise ValueError(f"RankedEncoders: inputs must be {self._fusion.encoders}, got {len(inputs)}")
        features = self._run(held("inputs", inputs, self.members))
        tokens, own = self._project_together(features) if self.obstacle is None else self._project_each(features)
        if tokens.shape[1] == 1:
            tokens = tokens.repeat(1, self._length, 1)
        scores = own.new_zeros(len(own), self._fusion.encoders)
        # With a list of indices the host would wait for the GPU.
        for member, score in zip(self.members, own.unbind(1), strict=True):
            scores[:, member] = score
        return Part(tokens, tokens.to(own.dtype), scores)

    def _project_together(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, S, D]`` and scores ``[B, members]``; all last layers are one product.

        The op keeps scores to itself. So it is given what enters the last layers, which makes its own averaging one of
        single tokens, and scores come from the mean of that: it commutes with a linear layer.
        """
        projectors = [cast(PooledProjector, projector) for projector in self._projectors]
        with without_autocast(features[0]):
            hidden = [before_last(projector, x) for projector, x in zip(projectors, features, strict=True)]
            weights = [projector.projector.linears[-1].weight for projector in projectors]
            biases = [projector.projector.linears[-1].bias for projector in projectors]
            query, bias = self._folded(weights[0].dtype)
            grids = [projector.out_grid for projector in projectors]
            tokens, _ = ops.pool_project_fuse(hidden, weights, biases, query, bias, grids, grids[0])
            exact = torch.promote_types(tokens.dtype, torch.float32)
            layers = zip(hidden, weights, biases, strict=True)
            means = [F.linear(h.mean((1, 2), dtype=exact), P.to(exact), b.to(exact)) for h, P, b in layers]
        return tokens, scores_of(means, query, bias)

    def _project_each(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, S, D]`` and scores ``[B, members]``, where projectors are not alike."""
        values = [projector(x) for projector, x in zip(self._projectors, features, strict=True)]
        query, bias = self._folded(values[0].dtype)
        tokens, _ = ops.fuse_encoders(values, query, bias)
        exact = torch.promote_types(tokens.dtype, torch.float32)
        return tokens, scores_of([value.mean(1, dtype=exact) for value in values], query, bias)

    def _folded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The fusion's query ``[D]`` and bias ``[members]``."""
        query, bias = self._fusion.folded(dtype)
        return query, torch.stack([bias[member] for member in self.members])


def before_last(projector: PooledProjector, x: Tensor) -> Tensor:
    """Tokens ``[B, t, h*w, K]`` that enter the last linear layer of a projector."""
    projector.check(x)
    linears = projector.projector.linears[:-1]
    pooled = ops.pool_tokens(x, projector.grid, projector.out_grid, projector.output_slots)
    return hidden_layers(pooled, [layer.weight for layer in linears], [layer.bias for layer in linears])


def scores_of(means: Sequence[Tensor], query: Tensor, bias: Tensor) -> Tensor:
    """Scores ``[B, members]`` of encoders' mean tokens ``[B, D]``; no product that autocast would round."""
    return torch.stack([(mean * query).sum(1) for mean in means], 1) + bias


def held(name: str, parts: Sequence[Held | None], members: Sequence[int]) -> list[Held]:
    """The members' parts; raises ``ValueError`` if one is absent."""
    if absent := [member for member in members if parts[member] is None]:
        rule = f"there on this rank, which runs encoder {absent[0]}"
        raise ValueError(f"RankedEncoders: {name}[{absent[0]}] must be {rule}, got None")
    return [cast(Held, parts[member]) for member in members]


def costs_of(encoders: Sequence[nn.Module | None]) -> list[float]:
    """The parameters of each encoder; raises ``ValueError`` if one is absent."""
    if None in encoders:
        rule = f"given where an encoder is absent, as encoders[{encoders.index(None)}] is"
        raise ValueError(f"RankedEncoders: costs must be {rule}, got None")
    return [float(sum(p.numel() for p in encoder.parameters())) for encoder in encoders if encoder is not None]
