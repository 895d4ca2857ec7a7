"""From each encoder's tokens to the LLM's width: one module for every ``arch_specifier`` of the reference."""

from math import isqrt, sqrt

import torch
from torch import Tensor, nn

from merv_fast import ops
from merv_fast.modules.architecture import Architecture
from merv_fast.modules.attentive import CrossAttentionBlock
from merv_fast.modules.mlp import MLP
from merv_fast.modules.regnet import RegNetStage

__all__ = [
    "AttentivePooler",
    "Conv3dProjector",
    "ConvProjector",
    "PooledProjector",
    "Projector",
    "TokenProjector",
    "build_projector",
]

ATTENTION_HEADS = 8
REGNET_DEPTH = 3

Grid = tuple[int, int]


def build_projector(
    arch_specifier: str, in_width: int, llm_width: int, tokens_per_slot: int, slots: int, grid: Grid | None
) -> "Projector":
    """The projector the reference builds for ``arch_specifier``, ``[B, T, N, C] -> [B, S, D]``.

    ``in_width`` is C, ``llm_width`` D, ``slots`` T, and ``grid`` the (height, width) that the N tokens of a
    slot form, or None where they form none. ``tokens_per_slot`` is what a resampler makes of a slot, a square
    number; without a resampler nothing is resampled and it is N itself. ``frame<k>`` leaves ``slots // k``
    slots.

    | ``arch_specifier`` has | module | a slot's tokens |
    |---|---|---|
    | ``avg``, ``3davg`` | `PooledProjector` | adaptive average pooling, per slot or over slots too |
    | ``attntv`` | `AttentivePooler` | learned queries |
    | ``conv`` | `ConvProjector` | RegNet stage, adaptive average pooling, RegNet stage |
    | ``3dconv`` | `Conv3dProjector` | 3x3x3 convolution, adaptive average pooling over slots too |
    | none of these | `TokenProjector` | every token |

    Raises ``ValueError`` for a specifier, token count or grid that does not fit.

    >>> projector = build_projector("3davg+linear", 24, 32, tokens_per_slot=4, slots=2, grid=(6, 6))
    >>> projector(torch.zeros(1, 2, 36, 24)).shape
    torch.Size([1, 8, 32])
    """
    architecture = Architecture.parse(arch_specifier)
    mlp, resampler = architecture.mlp, architecture.resampler
    if resampler == "none":
        if grid is not None and grid[0] * grid[1] != tokens_per_slot:
            raise ValueError(
                "build_projector: tokens_per_slot must be the grid's without a resampler "
                f"({grid[0] * grid[1]}), got {tokens_per_slot}"
            )
        return TokenProjector(in_width, llm_width, mlp, tokens_per_slot, slots)
    side = isqrt(max(tokens_per_slot, 0))
    if side < 1 or side**2 != tokens_per_slot:
        raise ValueError(f"build_projector: tokens_per_slot must be a square number, got {tokens_per_slot}")
    if resampler == "attntv":
        return AttentivePooler(in_width, llm_width, mlp, tokens_per_slot, slots)
    if grid is None:
        raise ValueError(f"build_projector: grid must be (height, width) for {resampler}, got None")
    if resampler == "conv":
        return ConvProjector(in_width, llm_width, mlp, grid, (side, side), slots)
    out_slots = slots // architecture.frame_divisor
    if out_slots < 1:
        raise ValueError(f"build_projector: frame<k> must leave a slot of {slots}, got {arch_specifier!r}")
    kind: type[Conv3dProjector | PooledProjector] = Conv3dProjector if resampler == "3dconv" else PooledProjector
    return kind(in_width, llm_width, mlp, grid, (side, side), slots, out_slots)


class Projector(nn.Module):
    """``[B, slots, tokens_in, in_width] -> [B, output_slots * output_tokens_per_slot, D]``, slot by slot."""

    op = "torch"

    def __init__(
        self, in_width: int, slots: int, tokens_in: int | None, output_slots: int, output_tokens_per_slot: int
    ) -> None:
        super().__init__()
        self.in_width = in_width
        self.slots = slots
        self.tokens_in = tokens_in
        self.output_slots = output_slots
        self.output_tokens_per_slot = output_tokens_per_slot

    def check(self, x: Tensor) -> None:
        """Raise ``ValueError`` unless ``x`` is what the encoder was said to return."""
        tokens = x.shape[2] if self.tokens_in is None and x.ndim == 4 else self.tokens_in
        expected = (self.slots, tokens, self.in_width)
        if x.ndim != 4 or x.shape[1:] != expected:
            shape = ", ".join(str(size) if size is not None else "N" for size in expected)
            raise ValueError(f"{type(self).__name__}: x must be [B, {shape}], got {list(x.shape)}")


class PooledProjector(Projector):
    """Adaptive average pooling of each slot's grid, and of the slots where they are fewer, then the MLP."""

    def __init__(
        self,
        in_width: int,
        llm_width: int,
        mlp: str,
        grid: Grid,
        out_grid: Grid,
        slots: int,
        output_slots: int,
    ) -> None:
        super().__init__(in_width, slots, grid[0] * grid[1], output_slots, out_grid[0] * out_grid[1])
        self.grid = grid
        self.out_grid = out_grid
        self.projector = MLP(mlp, in_width, llm_width)
        self.op = "pool_project" if self.projector.linears else "pool_tokens"

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, T, H*W, C] -> [B, t*h*w, D]``."""
        self.check(x)
        out_slots = None if self.output_slots == self.slots else self.output_slots
        linears = self.projector.linears
        if not linears:
            return ops.pool_tokens(x, self.grid, self.out_grid, out_slots).flatten(1, 2)
        weights, biases = [layer.weight for layer in linears], [layer.bias for layer in linears]
        return ops.pool_project(x, weights, biases, self.grid, self.out_grid, out_slots)


class AttentivePooler(Projector):
    """Learned queries attend to each slot's tokens, then the MLP."""

    def __init__(
        self, in_width: int, llm_width: int, mlp: str, queries: int, slots: int, heads: int = ATTENTION_HEADS
    ) -> None:
        super().__init__(in_width, slots, None, slots, queries)
        self.query_tokens = nn.Parameter(torch.empty(1, queries, in_width))
        self.cross_attn = CrossAttentionBlock(in_width, heads)
        self.projector = MLP(mlp, in_width, llm_width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """V-JEPA's start: truncated normal (std 0.02), zero biases, residual branches over sqrt(2)."""
        nn.init.trunc_normal_(self.query_tokens, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.cross_attn.xattn.proj.weight.div_(sqrt(2))
        self.cross_attn.mlp.fc2.weight.div_(sqrt(2))

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, T, N, C] -> [B, T*queries, D]``."""
        self.check(x)
        pooled = self.cross_attn(self.query_tokens, x.flatten(0, 1))
        return self.projector(pooled).unflatten(0, x.shape[:2]).flatten(1, 2)


class ConvProjector(Projector):
    """Honeybee's C-Abstractor on each slot: RegNet stage, adaptive average pooling, RegNet stage, MLP."""

    def __init__(self, in_width: int, llm_width: int, mlp: str, grid: Grid, out_grid: Grid, slots: int) -> None:
        super().__init__(in_width, slots, grid[0] * grid[1], slots, out_grid[0] * out_grid[1])
        self.grid = grid
        self.convolution_pooling = nn.Sequential(
            RegNetStage(in_width, llm_width, REGNET_DEPTH),
            nn.AdaptiveAvgPool2d(out_grid),
            RegNetStage(llm_width, llm_width, REGNET_DEPTH),
        )
        self.projector = MLP(mlp, llm_width, llm_width)

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, T, H*W, C] -> [B, T*h*w, D]``."""
        self.check(x)
        maps = x.unflatten(2, self.grid).flatten(0, 1).permute(0, 3, 1, 2)
        maps = self.convolution_pooling(maps).permute(0, 2, 3, 1)
        return self.projector(maps.flatten(1, 2)).unflatten(0, x.shape[:2]).flatten(1, 2)


class Conv3dProjector(Projector):
    """A 3x3x3 convolution over slots and grid, adaptive average pooling of both, then the MLP."""

    def __init__(
        self,
        in_width: int,
        llm_width: int,
        mlp: str,
        grid: Grid,
        out_grid: Grid,
        slots: int,
        output_slots: int,
    ) -> None:
        super().__init__(in_width, slots, grid[0] * grid[1], output_slots, out_grid[0] * out_grid[1])
        self.grid = grid
        self.convolution_pooling = nn.Sequential(
            nn.Conv3d(in_width, llm_width, 3, padding=1),
            nn.AdaptiveAvgPool3d((output_slots, *out_grid)),
        )
        self.projector = MLP(mlp, llm_width, llm_width)

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, T, H*W, C] -> [B, t*h*w, D]``."""
        self.check(x)
        maps = x.unflatten(2, self.grid).permute(0, 4, 1, 2, 3)
        maps = self.convolution_pooling(maps).permute(0, 2, 3, 4, 1)
        return self.projector(maps.flatten(1, 3))


class TokenProjector(Projector):
    """The MLP on every token the encoder returns, the poster's "class tok" and "257 tok"."""

    def __init__(self, in_width: int, llm_width: int, mlp: str, tokens_per_slot: int, slots: int) -> None:
        super().__init__(in_width, slots, tokens_per_slot, slots, tokens_per_slot)
        # Without a resampler the reference has no level between the module and its layers.
        self.projector = MLP(mlp, in_width, llm_width).projector

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, T, N, C] -> [B, T*N, D]``."""
        self.check(x)
        return self.projector(x.flatten(1, 2))
