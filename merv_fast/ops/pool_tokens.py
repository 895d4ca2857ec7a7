"""pool_tokens: shrink each slot's token grid by averaging, staying token-major.

    x    [B, T, H*W, C]   float64 | float32 | bfloat16 | float16, any strides
    out  [B, t, h*w, C]   x.dtype, contiguous; accumulated in float32 (float64 for float64)

Cell (k, i, j) averages rows floor(i*H/h) .. ceil((i+1)*H/h) - 1, and likewise columns and slots: the bins of
torch.nn.functional.adaptive_avg_pool3d, which overlap where they do not divide. With t = T every slot is its
own bin and the definition is that of adaptive_avg_pool2d.

Backward: each token receives, from every bin it lies in, the bin's gradient over the bin's size.

Source: the resamplers `avg` and `3davg` of MERV (arXiv 2501.01426).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from merv_fast.ops._autocast import outside_autocast, without_autocast
from merv_fast.ops._checks import check_count, check_grid, check_maps
from merv_fast.ops._kernels import register_kernel

__all__ = ["pool_tokens"]


def pool_tokens(x: Tensor, grid: tuple[int, int], out_grid: tuple[int, int], out_slots: int | None = None) -> Tensor:
    """Average the tokens of ``x [B, T, H*W, C]`` down to ``[B, t, h*w, C]``.

    Args:
        x: feature maps, float64, float32, bfloat16 or float16, tokens in row-major order.
        grid: (H, W), the token grid of a slot.
        out_grid: (h, w), the token grid returned; may be larger than ``grid`` (bins then repeat tokens).
        out_slots: t, the slots returned; every slot on its own if None.

    Raises:
        ValueError: a shape or count that does not fit.
        TypeError: x is not of one of the four dtypes.

    >>> pool_tokens(torch.tensor([0.0, 2.0, 4.0, 6.0]).view(1, 1, 4, 1), (2, 2), (1, 2)).flatten()
    tensor([2., 4.])
    """
    check_maps("pool_tokens", "x", x, "grid", grid)
    check_grid("pool_tokens", "out_grid", out_grid)
    slots = x.shape[1] if out_slots is None else out_slots
    check_count("pool_tokens", "out_slots", slots)
    with without_autocast(x):
        return torch.ops.merv_fast.pool_tokens.default(x, grid, out_grid, slots)


torch.library.define(
    "merv_fast::pool_tokens", "(Tensor x, SymInt[] grid, SymInt[] out_grid, SymInt out_slots) -> Tensor"
)
torch.library.define(
    "merv_fast::pool_tokens_backward",
    "(Tensor grad, SymInt[] grid, SymInt[] out_grid, SymInt slots) -> Tensor",
)


def reference(x: Tensor, grid: list[int], out_grid: list[int], out_slots: int) -> Tensor:
    """Average over space, then over slots: a bin's mean is the mean of its slots' means."""
    (B, T, _, C), (H, W), (h, w) = x.shape, grid, out_grid
    planes = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(B * T, H, W, C).permute(0, 3, 1, 2)
    pooled = F.adaptive_avg_pool2d(planes, (h, w)).permute(0, 2, 3, 1)
    if out_slots != T:
        pooled = F.adaptive_avg_pool2d(pooled.reshape(B, 1, T, h * w * C), (out_slots, h * w * C))
    return pooled.reshape(B, out_slots, h * w, C).to(x.dtype).contiguous()


def reference_backward(grad: Tensor, grid: list[int], out_grid: list[int], slots: int) -> Tensor:
    """Apply the transposed bins to columns, rows and slots; ``slots`` is T, the result [B, T, H*W, C]."""
    (B, t, _, C), (H, W), (h, w) = grad.shape, grid, out_grid
    dx = grad.to(torch.promote_types(grad.dtype, torch.float32)).reshape(B * t * h, w, C)
    dx = (_bins(W, w, dx).T @ dx).reshape(B * t, h, W * C)
    dx = (_bins(H, h, dx).T @ dx).reshape(B, t, H * W * C)
    if slots != t:
        dx = _bins(slots, t, dx).T @ dx
    return dx.reshape(B, slots, H * W, C).to(grad.dtype).contiguous()


def _bins(size: int, count: int, like: Tensor) -> Tensor:
    """The averaging matrix [count, size] of adaptive pooling, in the dtype and on the device of ``like``."""
    position = torch.arange(size, device=like.device)
    bin = torch.arange(count, device=like.device)[:, None]
    inside = (position >= bin * size // count) & (position < ((bin + 1) * size + count - 1) // count)
    return inside.to(like.dtype) / inside.sum(1, keepdim=True)


torch.library.impl("merv_fast::pool_tokens", "default", reference)
torch.library.impl("merv_fast::pool_tokens_backward", "default", reference_backward)
register_kernel("pool_tokens", reference)
register_kernel("pool_tokens_backward", reference_backward)


@torch.library.register_fake("merv_fast::pool_tokens")
def _fake(x: Tensor, grid: list[int], out_grid: list[int], out_slots: int) -> Tensor:
    return x.new_empty(x.shape[0], out_slots, out_grid[0] * out_grid[1], x.shape[3])


@torch.library.register_fake("merv_fast::pool_tokens_backward")
def _fake_backward(grad: Tensor, grid: list[int], out_grid: list[int], slots: int) -> Tensor:
    return grad.new_empty(grad.shape[0], slots, grid[0] * grid[1], grad.shape[3])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.grid, ctx.out_grid, _ = inputs
    ctx.slots = x.shape[1]


@outside_autocast
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    dx = torch.ops.merv_fast.pool_tokens_backward.default(grad, ctx.grid, ctx.out_grid, ctx.slots)
    return dx, None, None, None


def _keep_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, ctx.grid, ctx.out_grid, _ = inputs
    ctx.out_slots = grad.shape[1]


@outside_autocast
def _double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    # The op is linear: the adjoint of its adjoint is the op.
    dgrad = torch.ops.merv_fast.pool_tokens.default(grad, ctx.grid, ctx.out_grid, ctx.out_slots)
    return dgrad, None, None, None


torch.library.register_autograd("merv_fast::pool_tokens", _backward, setup_context=_keep)
torch.library.register_autograd("merv_fast::pool_tokens_backward", _double_backward, setup_context=_keep_backward)
