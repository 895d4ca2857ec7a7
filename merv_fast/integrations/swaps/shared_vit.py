"""Our vision transformer on the weights of somebody else's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from merv_fast.encoders import EncoderConfig, VisionTransformer, convert_state_dict
from merv_fast.versions import Versions

__all__ = ["SharedViT"]

PACKED = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
"""Names under which an attention holds its three projections apart."""


class SharedViT:
    """`VisionTransformer` of ``config`` whose weights lie where those of ``theirs`` lie.

    Three projections that a module holds apart are laid one behind the other in memory, of which each then is a view;
    `unpack` gives them memory of their own again. What ours only has as a sum (positions and biases, the class token
    and its position) is computed anew when a weight has been written to: 2.7 % of ViViT's weights, 0.2 % or less of the
    others'.
    """

    def __init__(self, theirs: nn.Module, config: EncoderConfig) -> None:
        self.theirs, self.config = theirs, config
        self.made: tuple[Versions, VisionTransformer] | None = None

    def ours(self) -> VisionTransformer:
        """The module, of the weights as they are now."""
        parameters = list(self.theirs.parameters())
        if self.made is None or not self.made[0].same(parameters):
            pack(self.theirs)
            with torch.device("meta"):
                vit = VisionTransformer(self.config)
            state = convert_state_dict(self.config, self.theirs.state_dict())
            vit.load_state_dict(state, assign=True)
            # Not of what was there before: packing moved it.
            self.made = Versions(parameters), vit.eval().requires_grad_(False)
        return self.made[1]

    def needs_theirs(self) -> bool:
        """Whether a gradient to their weights is wanted, or something is dropped at random."""
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.theirs.parameters()):
            return True
        return self.theirs.training and any(
            getattr(part, "p", 0) or getattr(part, "drop_prob", 0) for part in self.theirs.modules()
        )

    def __call__(self, pixels: Tensor) -> Tensor:
        """``[B, F, 3, S, S]`` -> ``[B, T, N, C]``."""
        return self.ours()(pixels)


def triples(module: nn.Module) -> list[list[nn.Linear]]:
    """The three projections of every attention that holds them apart."""
    found = []
    for part in module.modules():
        for names in PACKED:
            linears = [getattr(part, name, None) for name in names]
            if all(type(linear) is nn.Linear for linear in linears):
                found.append(linears)
    return found  # type: ignore[return-value]


def pack(module: nn.Module) -> None:
    """Lay the three projections of every attention one behind the other in memory."""
    for linears in triples(module):
        for leaf in ("weight", "bias"):
            parts = [getattr(linear, leaf) for linear in linears]
            if not any(part is None for part in parts):
                memory = torch.cat([part.data for part in parts])
                for part, view in zip(parts, memory.chunk(3), strict=True):
                    part.data = view


def unpack(module: nn.Module) -> None:
    """Give each projection memory of its own."""
    for linears in triples(module):
        for linear in linears:
            for parameter in linear.parameters():
                parameter.data = parameter.data.clone()
