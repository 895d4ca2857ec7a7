"""pool_tokens, for any number of encoders in one launch: a program makes BLOCK_S cells by BLOCK_C channels.

A cell gathers the tokens of its bin, so every program writes what no other does and nothing is atomic. The
adjoint is the same gather with the two grids exchanged, as token r lies in just the bins floor(r*h/H) ..
ceil((r+1)*h/H) - 1; only the divisor moves from the cell to the bin that is read.

Where the scores of pool_project_fuse are asked for, a program also multiplies its cells with its share of a_e
and writes one partial sum: the mean over the tokens costs no second pass.

Bytes: each map once (overlapping bins meet their neighbours' tokens in L2), each cell once. The four maps of
MERV in bf16 are 26.4 MB in and 7.3 MB out. Pooling in the prologue of the projector's GEMM instead would read
the maps once per column tile: 16 times 26.4 MB through L2 for tiles of 256 of 4096 columns, where reading the
pooled tokens that often costs 117 MB; it would also keep the tokens from reaching shared memory by TMA.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from merv_fast.kernels._launch import Cost, capability, cdiv, unit_stride, wide

__all__ = ["cost", "launch", "launch_backward", "pool"]


UNROLL = tl.constexpr(4)


@triton.jit
def bin_start(i, size, count):
    return i * size // count


@triton.jit
def bin_end(i, size, count):
    return ((i + 1) * size + count - 1) // count


@triton.jit
def bin_size(i, size, count):
    return bin_end(i, size, count) - bin_start(i, size, count)


@triton.jit
def pool_kernel(
    x_ptrs, out_ptrs, a_ptrs, sums_ptr, first_programs,
    strides_xb, strides_xt, strides_xn, stride_ob, stride_os, slots, steps, out_t, channels, widths, CHUNKS,
    GRIDS: tl.constexpr, BINS: tl.constexpr, out_h: tl.constexpr, out_w: tl.constexpr,
    E: tl.constexpr, SCORES: tl.constexpr, ADJOINT: tl.constexpr, DEPENDENTS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Once every program has come here, those of a dependent launch may take what room is left; they wait for all.
    if DEPENDENTS:
        gdc_launch_dependents()
    program = tl.program_id(0)
    S = out_t * out_h * out_w
    for e in tl.static_range(E):
        if (program >= first_programs[e]) & (program < first_programs[e + 1]):
            c_tiles = tl.cdiv(widths[e], BLOCK_C)
            chunks = tl.cdiv(S, BLOCK_S) * c_tiles
            b = ((program - first_programs[e]) // chunks).to(tl.int64)
            chunk = (program - first_programs[e]) % chunks
            s = chunk // c_tiles * BLOCK_S + tl.arange(0, BLOCK_S)
            c = chunk % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
            in_s, in_c = s < S, c < channels[e]
            t, i, j = s // (out_h * out_w), s // out_w % out_h, s % out_w
            H: tl.constexpr = GRIDS[e][0]
            W: tl.constexpr = GRIDS[e][1]
            T = slots[e]
            BIN_H: tl.constexpr = BINS[e][0]
            BIN_W: tl.constexpr = BINS[e][1]
            x_ptr = x_ptrs[e] + b * strides_xb[e]
            first_k, first_row, first_column = bin_start(t, T, out_t), bin_start(i, H, out_h), bin_start(j, W, out_w)
            end_k, end_row, end_column = bin_end(t, T, out_t), bin_end(i, H, out_h), bin_end(j, W, out_w)
            cells = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
            # Four loads in flight; a step past the bin's last token reads nothing.
            for first in range(0, steps[e], UNROLL):
                for u in tl.static_range(UNROLL):
                    k = first_k + (first + u) // (BIN_H * BIN_W)
                    row = first_row + (first + u) // BIN_W % BIN_H
                    column = first_column + (first + u) % BIN_W
                    inside = in_s & (k < end_k) & (row < end_row) & (column < end_column)
                    offset = k.to(tl.int64) * strides_xt[e] + (row * W + column).to(tl.int64) * strides_xn[e]
                    mask = inside[:, None] & in_c[None, :]
                    token = tl.load(x_ptr + offset[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
                    if ADJOINT:
                        size = bin_size(k, out_t, T) * bin_size(row, out_h, H) * bin_size(column, out_w, W)
                        token *= (1.0 / size.to(tl.float32))[:, None]
                    cells += token
            if not ADJOINT:
                size = (end_k - first_k) * (end_row - first_row) * (end_column - first_column)
                cells *= (1.0 / size.to(tl.float32))[:, None]
            rounded = cells.to(out_ptrs[e].dtype.element_ty)
            out_offset = b * stride_ob + s.to(tl.int64)[:, None] * stride_os + c[None, :]
            tl.store(out_ptrs[e] + out_offset, rounded, mask=in_s[:, None] & (c < widths[e])[None, :])
            if SCORES:
                a = tl.load(a_ptrs[e] + c, mask=in_c, other=0.0)
                partial = tl.sum(tl.sum(rounded.to(tl.float32) * a[None, :], 1), 0)
                tl.store(sums_ptr + (b * E + e) * CHUNKS + chunk, partial)


class Launch(NamedTuple):
    """Cells and channels of a program, and its warps."""

    block_s: int
    block_c: int
    num_warps: int


LAUNCHES = {80: Launch(8, 128, 4), 90: Launch(8, 128, 4), 100: Launch(8, 128, 4)}


def launch(x: Tensor, grid: Sequence[int], out_grid: Sequence[int], out_slots: int) -> Tensor:
    """pool_tokens of ``x [B, T, H*W, C]``."""
    out = x.new_empty(x.shape[0], out_slots, out_grid[0] * out_grid[1], x.shape[3])
    pool([x], [grid], out_grid, out_slots, [out.flatten(1, 2)])
    return out


def launch_backward(grad: Tensor, grid: Sequence[int], out_grid: Sequence[int], slots: int) -> Tensor:
    """pool_tokens_backward of ``grad [B, t, h*w, C]``."""
    out = grad.new_empty(grad.shape[0], slots, grid[0] * grid[1], grad.shape[3])
    pool([grad], [out_grid], grid, slots, [out.flatten(1, 2)], adjoint=True)
    return out


def pool(
    xs: Sequence[Tensor],
    grids: Sequence[Sequence[int]],
    out_grid: Sequence[int],
    out_slots: int,
    outs: Sequence[Tensor],
    score_vectors: Sequence[Tensor] | None = None,
    adjoint: bool = False,
    dependents: bool = False,
) -> tuple[Tensor, list[int]]:
    """Pool every ``xs[e] [B, T_e, H_e*W_e, C_e]`` into ``outs[e] [B, S, C_e or more]``, which share their strides.

    Channels beyond C_e are filled with zeros. With ``dependents`` a dependent launch that follows may begin early.

    With ``score_vectors``, E float32 tensors [C_e], returns (sums [B, E, CHUNKS] float32, chunks): the first
    chunks[e] of row e add up to ``sum_s outs[e][:, s] . score_vectors[e]``; the rest is not written. Without
    them sums has no elements.
    """
    E, B, choice = len(xs), xs[0].shape[0], LAUNCHES[capability()]
    xs = [unit_stride(x) for x in xs]
    if adjoint:
        # Beside the divisors of its bins a thread has registers for one load a token, of 16 bytes or of two elements.
        even = wide(*xs, *outs)
        parts = 4 if not even else xs[0].element_size() // 2
        choice = choice._replace(block_s=max(1, choice.block_s // parts))
    widths = tuple(out.shape[2] for out in outs)
    (h, w), S = out_grid, out_slots * out_grid[0] * out_grid[1]
    chunks = [cdiv(S, choice.block_s) * cdiv(C, choice.block_c) for C in widths]
    first_programs = (0, *(B * sum(chunks[: e + 1]) for e in range(E)))
    bins = [(widest_bin(H, h), widest_bin(W, w)) for H, W in grids]
    scores = score_vectors is not None
    sums = torch.empty(B, E, max(chunks) if scores else 0, dtype=torch.float32, device=xs[0].device)
    pool_kernel[(first_programs[-1],)](
        tuple(xs),
        tuple(outs),
        tuple(score_vectors) if score_vectors is not None else tuple(outs),
        sums,
        first_programs,
        tuple(x.stride(0) for x in xs),
        tuple(x.stride(1) for x in xs),
        tuple(x.stride(2) for x in xs),
        outs[0].stride(0),
        outs[0].stride(1),
        tuple(x.shape[1] for x in xs),
        # At run time, or the compiler unrolls the whole bin and spills.
        tuple(widest_bin(x.shape[1], out_slots) * rows * columns for x, (rows, columns) in zip(xs, bins, strict=True)),
        out_slots,
        tuple(x.shape[3] for x in xs),
        widths,
        max(chunks),
        GRIDS=tuple((H, W) for H, W in grids),
        BINS=tuple(bins),
        out_h=h,
        out_w=w,
        E=E,
        SCORES=scores,
        ADJOINT=adjoint,
        DEPENDENTS=dependents,
        BLOCK_S=choice.block_s,
        BLOCK_C=choice.block_c,
        num_warps=choice.num_warps,
    )
    return sums, chunks


@lru_cache(maxsize=256)
def widest_bin(size: int, count: int) -> int:
    """Positions of the largest of ``count`` bins over ``size``."""
    return max(-(-(i + 1) * size // count) - i * size // count for i in range(count))


def cost(x: Tensor, grid: Sequence[int], out_grid: Sequence[int], out_slots: int) -> Cost:
    """Each token read once and added once, each cell written once."""
    cells = x.shape[0] * out_slots * out_grid[0] * out_grid[1] * x.shape[3]
    return Cost(x.numel(), (x.numel() + cells) * x.element_size())
