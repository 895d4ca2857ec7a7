"""What the scores add to the matrices' gradients, dP_e += query m_e^T, and the query's, sum_e P_e m_e: one launch.

A program takes BLOCK_D rows of every encoder's matrix and its gradient, BLOCK_C columns at a time, so that each
element of the query's gradient is one program's sum.

Bytes: each matrix read once, each gradient read and written once, in the dtype they have: MERV's 88 MB in bf16, where
outer products, sums and matrices in float32 move 440 MB.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from merv_fast.kernels._launch import capability, cdiv, unit_stride, wide

__all__ = ["Launch", "add_outer"]


@triton.jit
def outer_kernel(
    grad_ptrs, weight_ptrs, mean_ptrs, query_ptr, out_ptr, strides_g, strides_w, widths, D,
    E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d, rows = d < D, d.to(tl.int64)[:, None]
    query = tl.load(query_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_D, BLOCK_C), tl.float32)
    for e in tl.static_range(E):
        for start in range(0, widths[e], BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            mask = in_d[:, None] & (c < widths[e])
            mean = tl.load(mean_ptrs[e] + c, mask=c < widths[e], other=0.0)
            weight = tl.load(weight_ptrs[e] + rows * strides_w[e] + c, mask=mask, other=0.0)
            grad_ptr = grad_ptrs[e] + rows * strides_g[e] + c
            grad = tl.load(grad_ptr, mask=mask, other=0.0).to(tl.float32) + query[:, None] * mean
            sums += weight.to(tl.float32) * mean
            tl.store(grad_ptr, grad.to(grad_ptrs[e].dtype.element_ty), mask=mask)
    tl.store(out_ptr + d, tl.sum(sums, 1), mask=in_d)


class Launch(NamedTuple):
    """Rows of a program and columns of a step, and its warps."""

    block_d: int
    block_c: int
    num_warps: int


LAUNCHES = {80: Launch(8, 256, 4), 90: Launch(8, 256, 4), 100: Launch(8, 256, 4)}


def add_outer(grads: Sequence[Tensor], weights: Sequence[Tensor], query: Tensor, means: Sequence[Tensor]) -> Tensor:
    """Add ``query means[e]^T`` to ``grads[e]`` and return ``sum_e weights[e] means[e]``, float32 ``[D]``.

    Computed in float32; the gradients are rounded once.

    Args:
        grads: ``[D, C_e]`` of E encoders, of unit column stride.
        weights: P_e ``[D, C_e]``, any strides.
        query: ``[D]``.
        means: m_e ``[C_e]``, contiguous, float32.
    """
    D, choice, weights = len(query), LAUNCHES[capability()], [unit_stride(weight) for weight in weights]
    out = torch.empty(D, dtype=torch.float32, device=query.device)
    outer_kernel[(cdiv(D, choice.block_d),)](
        tuple(grads),
        tuple(weights),
        tuple(means),
        query.contiguous(),
        out,
        tuple(grad.stride(0) for grad in grads),
        tuple(weight.stride(0) for weight in weights),
        tuple(grad.shape[1] for grad in grads),
        D,
        E=len(grads),
        BLOCK_D=choice.block_d,
        BLOCK_C=choice.block_c,
        # Rows that are not aligned are read element by element, each from an address in registers.
        num_warps=choice.num_warps * (1 if wide(*grads, *weights) else 2),
    )
    return out
