"""pool_project: pool each slot's token grid and carry the tokens to the language model's width.

    x           [B, T, H*W, C]     float64 | float32 | bfloat16 | float16, any strides
    weights[l]  [out_l, in_l]      x.dtype; in_0 = C, in_l = out_(l-1), out of the last layer = D
    biases[l]   [out_l]            x.dtype
    out         [B, t*h*w, D]      x.dtype, contiguous; tokens in the order (slot, row, column)

The tokens of pool_tokens pass through the layers, with an exact (erf) GELU between one and the next.
Sums are in float32 (float64 for float64); what lies between two layers is rounded to x.dtype.

Backward recomputes the pooled tokens and the layers from x: nothing but the inputs is kept.

Source: MERV (arXiv 2501.01426), resamplers `avg` and `3davg` with `linear`, `gelu-mlp` or `fused-gelu-mlp`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from merv_fast.ops._autocast import outside_autocast, without_autocast
from merv_fast.ops._autograd import refuse_second_derivative
from merv_fast.ops._checks import check_count, check_grid, check_layers, check_maps
from merv_fast.ops._hidden_layers import hidden_layers, hidden_layers_backward, linear_backward
from merv_fast.ops._kernels import register_kernel

__all__ = ["pool_project"]


def pool_project(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    grid: tuple[int, int],
    out_grid: tuple[int, int],
    out_slots: int | None = None,
) -> Tensor:
    """Pool ``x [B, T, H*W, C]`` to ``[B, t, h*w, C]`` and project the tokens: ``[B, t*h*w, D]``.

    Args:
        x: feature maps, float64, float32, bfloat16 or float16, tokens in row-major order.
        weights: one ``[out, in]`` matrix a layer, as torch.nn.Linear has it.
        biases: one ``[out]`` vector a layer.
        grid: (H, W), the token grid of a slot.
        out_grid: (h, w), the token grid it is pooled to.
        out_slots: t, the slots they are pooled to; every slot on its own if None.

    Raises:
        ValueError: a shape, count or device that does not fit.
        TypeError: x is not of one of the four dtypes, or the others are not of x's.

    >>> x = torch.tensor([0.0, 2.0, 4.0, 6.0]).view(1, 1, 4, 1)
    >>> pool_project(x, [torch.tensor([[10.0]])], [torch.tensor([1.0])], (2, 2), (1, 2)).flatten()
    tensor([21., 41.])
    """
    check_maps("pool_project", "x", x, "grid", grid)
    check_grid("pool_project", "out_grid", out_grid)
    slots = x.shape[1] if out_slots is None else out_slots
    check_count("pool_project", "out_slots", slots)
    if not weights:
        raise ValueError("pool_project: weights must be at least 1 layer, got 0")
    if len(biases) != len(weights):
        raise ValueError(f"pool_project: biases must be {len(weights)} tensors like weights, got {len(biases)}")
    check_layers("pool_project", "x", x, 0, weights, biases)
    with without_autocast(x):
        return torch.ops.merv_fast.pool_project.default(x, list(weights), list(biases), grid, out_grid, slots)


torch.library.define(
    "merv_fast::pool_project",
    "(Tensor x, Tensor[] weights, Tensor[] biases, SymInt[] grid, SymInt[] out_grid, SymInt out_slots) -> Tensor",
)
# dx comes back as a list of one, or of none where x needs no gradient: encoders are usually frozen.
torch.library.define(
    "merv_fast::pool_project_backward",
    "(Tensor grad, Tensor x, Tensor[] weights, Tensor[] biases, SymInt[] grid, SymInt[] out_grid, "
    "SymInt out_slots, bool needs_x) -> (Tensor[] dx, Tensor[] dweights, Tensor[] dbiases)",
)


def reference(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    grid: list[int],
    out_grid: list[int],
    out_slots: int,
) -> Tensor:
    """Pool, pass the hidden layers, then the last one."""
    tokens = torch.ops.merv_fast.pool_tokens.default(x, grid, out_grid, out_slots).flatten(1, 2)
    return F.linear(hidden_layers(tokens, weights[:-1], biases[:-1]), weights[-1], biases[-1])


def reference_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    grid: list[int],
    out_grid: list[int],
    out_slots: int,
    needs_x: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Walk back through the last layer, the hidden ones and the pooling; every device does it so.

    Its products are plain ones, and the pooling finds its own kernels.
    """
    pooled = torch.ops.merv_fast.pool_tokens.default(x, grid, out_grid, out_slots).flatten(1, 2)
    hidden = hidden_layers(pooled, weights[:-1], biases[:-1])
    dweight, dbias = linear_backward(grad, hidden)
    dx: list[Tensor] = []
    dhidden = grad @ weights[-1] if needs_x or len(weights) > 1 else grad
    dpooled, dweights, dbiases = hidden_layers_backward(dhidden, pooled, weights[:-1], biases[:-1], needs_x)
    if dpooled is not None:
        maps = dpooled.unflatten(1, (out_slots, -1))
        dx = [torch.ops.merv_fast.pool_tokens_backward.default(maps, grid, out_grid, x.shape[1])]
    return dx, [*dweights, dweight], [*dbiases, dbias]


torch.library.impl("merv_fast::pool_project", "default", reference)
torch.library.impl("merv_fast::pool_project_backward", "default", reference_backward)
register_kernel("pool_project", reference)


@torch.library.register_fake("merv_fast::pool_project")
def _fake(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    grid: list[int],
    out_grid: list[int],
    out_slots: int,
) -> Tensor:
    return x.new_empty(x.shape[0], out_slots * out_grid[0] * out_grid[1], weights[-1].shape[0])


@torch.library.register_fake("merv_fast::pool_project_backward")
def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    grid: list[int],
    out_grid: list[int],
    out_slots: int,
    needs_x: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    dx = [x.new_empty(x.shape)] if needs_x else []
    return dx, [w.new_empty(w.shape) for w in weights], [b.new_empty(b.shape) for b in biases]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, biases, ctx.grid, ctx.out_grid, ctx.out_slots = inputs
    ctx.save_for_backward(x, *weights, *biases)


@outside_autocast
def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *layers = ctx.saved_tensors
    weights, biases = layers[: len(layers) // 2], layers[len(layers) // 2 :]
    dx, dweights, dbiases = torch.ops.merv_fast.pool_project_backward.default(
        grad, x, weights, biases, ctx.grid, ctx.out_grid, ctx.out_slots, ctx.needs_input_grad[0]
    )
    return dx[0] if dx else None, dweights, dbiases, None, None, None


torch.library.register_autograd("merv_fast::pool_project", _backward, setup_context=_keep)
refuse_second_derivative("pool_project_backward")
