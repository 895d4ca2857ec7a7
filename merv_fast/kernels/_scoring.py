"""What pool_project_fuse weighs mean tokens with, a_e = P_e^T query and c_e = b_e . query + bias_e, in one launch.

A program sums BLOCK_C columns of one encoder's matrix, weighed by the query, over all rows; DEPTH tiles of BLOCK_D rows
are under way at a time. The first program of an encoder makes its c_e as well.

Bytes: each matrix once, MERV's 29.4 MB in bf16, where a product of matrices cast to float32 moves 147 MB. What is
left of them in L2 is read from there by the GEMM that follows.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from merv_fast.kernels._launch import capability, cdiv, unit_stride, wide

__all__ = ["Launch", "scoring"]


@triton.jit
def scoring_kernel(
    weight_ptrs, bias_ptrs, query_ptr, bias_ptr, vector_ptr, offset_ptr,
    strides_w, widths, first_programs, first_columns, D,
    E: tl.constexpr, OFFSETS: tl.constexpr, DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    for e in tl.static_range(E):
        tile = program - first_programs[e]
        if (tile >= 0) & (program < first_programs[e + 1]):
            c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
            in_c = c < widths[e]
            sums, products = tl.zeros((BLOCK_D, BLOCK_C), tl.float32), tl.zeros((DEPTH, BLOCK_D), tl.float32)
            for start in range(0, D, DEPTH * BLOCK_D):
                d = start + tl.arange(0, DEPTH)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
                offset = d.to(tl.int64)[:, :, None] * strides_w[e] + c
                weight = tl.load(weight_ptrs[e] + offset, mask=(d < D)[:, :, None] & in_c, other=0.0)
                query = tl.load(query_ptr + d, mask=d < D, other=0.0).to(tl.float32)
                sums += tl.sum(query[:, :, None] * weight.to(tl.float32), 0)
                if OFFSETS:
                    bias = tl.load(bias_ptrs[e] + d, mask=(d < D) & (tile == 0), other=0.0)
                    products += query * bias.to(tl.float32)
            tl.store(vector_ptr + first_columns[e] + c, tl.sum(sums, 0), mask=in_c)
            if OFFSETS:
                product = tl.sum(products) + tl.load(bias_ptr + e).to(tl.float32)
                tl.store(offset_ptr + e, product, mask=tile == 0)


class Launch(NamedTuple):
    """Tiles under way, rows of each, and columns of a program, and its warps."""

    depth: int
    block_d: int
    block_c: int
    num_warps: int


# 64 bytes of a row in bf16: MERV's 3584 columns are a program for most SMs.
LAUNCHES = {80: Launch(4, 256, 32, 8), 90: Launch(4, 256, 32, 8), 100: Launch(4, 256, 32, 8)}

ALIGNMENT = 4
"""Columns: each vector starts at 16 bytes."""


def scoring(
    weights: Sequence[Tensor], query: Tensor, biases: Sequence[Tensor] = (), bias: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """``a_e = weights[e]^T query``, E tensors [C_e], and ``c = [biases[e] . query + bias_e]`` [E], all float32.

    Args:
        weights: P_e ``[D, C_e]`` of E encoders, any strides.
        query: ``[D]``.
        biases: b_e ``[D]``; without them c is empty.
        bias: ``[E]``.
    """
    E, D, choice = len(weights), len(query), LAUNCHES[capability()]
    weights, query, biases = [unit_stride(w) for w in weights], query.contiguous(), [b.contiguous() for b in biases]
    widths = [w.shape[1] for w in weights]
    even, rooms = wide(*weights), [cdiv(width, ALIGNMENT) * ALIGNMENT for width in widths]
    vectors = torch.empty(sum(rooms), dtype=torch.float32, device=query.device)
    offsets = torch.empty(len(biases), dtype=torch.float32, device=query.device)
    first_programs = (0, *accumulate(cdiv(width, choice.block_c) for width in widths))
    scoring_kernel[(first_programs[-1],)](
        tuple(weights),
        tuple(biases) or tuple(weights),
        query,
        query if bias is None else bias.contiguous(),
        vectors,
        offsets,
        tuple(w.stride(0) for w in weights),
        tuple(widths),
        first_programs,
        tuple(accumulate(rooms[:-1], initial=0)),
        D,
        E=E,
        OFFSETS=bool(biases),
        # An element that is loaded alone has an address of its own, and registers would not hold so many.
        DEPTH=choice.depth if even else 1,
        BLOCK_D=choice.block_d,
        BLOCK_C=choice.block_c,
        num_warps=choice.num_warps * (1 if even else 2),
    )
    return [room[:width] for room, width in zip(vectors.split(rooms), widths, strict=True)], offsets
