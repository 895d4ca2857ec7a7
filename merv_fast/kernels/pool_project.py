"""pool_project: one launch pools, then one GEMM a layer, with bias and GELU in its epilogue.

The pooled tokens go through memory: kernels/pool_tokens.py counts why. Rows of all videos are one matrix.

Bytes, MERV's widest encoder in bf16: 8.4 MB of maps in, 2.1 MB of tokens out and in again, 8.4 MB of weights,
8.4 MB of result.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from merv_fast.kernels._gemm import ALIGNMENT, is_dependent, project
from merv_fast.kernels._launch import Cost
from merv_fast.kernels.pool_tokens import cost as pool_cost
from merv_fast.kernels.pool_tokens import pool

__all__ = ["cost", "launch", "token_buffers"]


def launch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    grid: Sequence[int],
    out_grid: Sequence[int],
    out_slots: int,
) -> Tensor:
    """pool_project of ``x [B, T, H*W, C]``."""
    B, S = x.shape[0], out_slots * out_grid[0] * out_grid[1]
    (buffer,) = token_buffers(B, S, [x])
    dependents = is_dependent(1, B * S, weights[0].shape[0], x.dtype, gelu=len(weights) > 1)
    pool([x], [grid], out_grid, out_slots, [buffer], dependents=dependents)
    tokens = buffer.view(1, B * S, -1)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        tokens = project(tokens, weight, bias, gelu=layer < len(weights) - 1)
    return tokens.view(B, S, -1)


def token_buffers(B: int, S: int, xs: Sequence[Tensor]) -> list[Tensor]:
    """Room for the pooled tokens of each of ``xs``, side by side: ``[B, S, C_e]``, C_e rounded up for the GEMM."""
    widths = [x.shape[3] + -x.shape[3] % ALIGNMENT for x in xs]
    return list(torch.empty(B, S, sum(widths), dtype=xs[0].dtype, device=xs[0].device).split(widths, 2))


def cost(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    grid: Sequence[int],
    out_grid: Sequence[int],
    out_slots: int,
) -> Cost:
    """The pooling, every layer's product, and each map, matrix and result once through memory."""
    pooling = pool_cost(x, grid, out_grid, out_slots)
    rows = x.shape[0] * out_slots * out_grid[0] * out_grid[1]
    flops = pooling.flops + sum(2 * rows * weight.numel() for weight in weights)
    elements = x.numel() + rows * weights[-1].shape[0] + sum(t.numel() for t in (*weights, *biases))
    return Cost(flops, elements * x.element_size())
