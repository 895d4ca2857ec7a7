"""Projectors and fusion together, collapsed into one op where the algebra allows it."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from merv_fast import ops
from merv_fast.modules.fusion import Fusion, WeighingFusion
from merv_fast.modules.projectors import PooledProjector, Projector

__all__ = ["Tail"]


class Tail(nn.Module):
    """Encoder outputs to visual tokens, ``E x [B, T, N, C] -> (tokens [B, S, D], weights [B, E] | None)``.

    Where every projector is average pooling and an MLP, alike in everything but the encoder's grid and width,
    and the fusion is a weighted sum, the weights need only means and the last linear layers and the fusion
    are one GEMM (`ops.pool_project_fuse`); else each encoder is projected by itself and then fused. The
    choice is made here, once; ``plan`` lists it as (part, op, reason). Both ways compute the same numbers
    from the same parameters. Raises ``ValueError`` if the projectors do not fit the fusion.

    >>> import torch
    >>> from merv_fast.modules.fusion import build_fusion
    >>> from merv_fast.modules.projectors import build_projector
    >>> projectors = [build_projector("3davg+linear", 24, 32, 4, slots=2, grid=(6, 6)) for _ in range(2)]
    >>> tail = Tail(projectors, build_fusion("cross_attention_avg_lq", 2, llm_width=32))
    >>> tokens, encoder_weights = tail([torch.zeros(1, 2, 36, 24)] * 2)
    >>> tokens.shape, encoder_weights.shape
    (torch.Size([1, 8, 32]), torch.Size([1, 2]))
    """

    def __init__(self, projectors: Sequence[Projector], fusion: Fusion) -> None:
        super().__init__()
        self.projectors = nn.ModuleList(projectors)
        self.fusion = fusion
        self.output_tokens = fusion.output_tokens([p.output_slots * p.output_tokens_per_slot for p in projectors])
        obstacle = find_obstacle(projectors, fusion)
        self.collapsed = obstacle is None
        self.plan = collapsed_plan(projectors) if obstacle is None else separate_plan(projectors, fusion, obstacle)

    def forward(self, xs: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """``xs``, E tensors ``[B, T_e, N_e, C_e]``, to ``[B, S, D]`` and ``[B, E]`` or None."""
        self.fusion.check_encoders(xs)
        if self.collapsed:
            return self._collapsed(xs)
        return self.fusion([projector(x) for projector, x in zip(self.projectors, xs, strict=True)])

    def _collapsed(self, xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        projectors = [cast(PooledProjector, projector) for projector in self.projectors]
        for projector, x in zip(projectors, xs, strict=True):
            projector.check(x)
        linears = [layer for projector in projectors for layer in projector.projector.linears]
        first = projectors[0]
        pooled_slots = any(projector.slots != first.output_slots for projector in projectors)
        query, bias = cast(WeighingFusion, self.fusion).folded(linears[0].weight.dtype)
        return ops.pool_project_fuse(
            list(xs),
            [layer.weight for layer in linears],
            [layer.bias for layer in linears],
            query,
            bias,
            [projector.grid for projector in projectors],
            first.out_grid,
            first.output_slots if pooled_slots else None,
        )


def find_obstacle(projectors: Sequence[Projector], fusion: Fusion) -> str | None:
    """Why the collapsed op cannot serve, or None."""
    if not isinstance(fusion, WeighingFusion):
        return f"{type(fusion).__name__} is not a weighted sum of the encoders"
    pooled = [projector for projector in projectors if isinstance(projector, PooledProjector)]
    if len(pooled) < len(projectors):
        names = sorted({type(p).__name__ for p in projectors} - {PooledProjector.__name__})
        return f"{', '.join(names)} is not average pooling and an MLP"
    if len({(p.out_grid, p.output_slots) for p in pooled}) > 1:
        return "the projectors pool to different grids or slots"
    depths = {len(p.projector.linears) for p in pooled}
    if depths == {0}:
        return "the projectors have no linear layer to merge"
    if len(depths) > 1:
        return "the projectors' MLPs differ in depth"
    return None


def collapsed_plan(projectors: Sequence[Projector]) -> list[tuple[str, str, str]]:
    first = cast(PooledProjector, projectors[0])
    height, width = first.out_grid
    reason = (
        f"{len(projectors)} encoders, each averaged to {first.output_slots} slots of {height}x{width}, "
        f"{len(first.projector.linears)} linear layer(s), then a weighted sum"
    )
    return [("projectors and fusion", "pool_project_fuse", reason)]


def separate_plan(projectors: Sequence[Projector], fusion: Fusion, obstacle: str) -> list[tuple[str, str, str]]:
    parts = [
        (f"projector {index}", projector.op, type(projector).__name__) for index, projector in enumerate(projectors)
    ]
    return [*parts, ("fusion", fusion.op, f"separate: {obstacle}")]
