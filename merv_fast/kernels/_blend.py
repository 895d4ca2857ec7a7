"""The backward passes over tokens that fuse_encoders and pool_project_fuse share; each is one launch.

A program makes BLOCK_S tokens by BLOCK_D channels of one encoder of one video. The grid is that of the longest and
widest encoder for all of them: where an encoder is smaller a program writes zeros, or nothing, and ends.
Programs go channel tiles first, then token tiles, encoders, videos: a gradient common to all encoders is read from
memory once, and from L2 (8.4 MB a video for MERV) by the others.

Bytes: `dots` reads each value and each gradient once and writes 1/32 of the values' bytes in bf16; `blend` reads
and writes each of its tensors once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from merv_fast.kernels._launch import capability, cdiv, unit_stride, wide

__all__ = ["Launch", "blend", "dots"]


@triton.jit
def tile_of(program, s_tiles, d_tiles, n, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """(video, which of n, token tile, tokens, channels) of a program."""
    d_tile, rest = program % d_tiles, program // d_tiles
    s_tile, rest = rest % s_tiles, rest // s_tiles
    s = s_tile * BLOCK_S + tl.arange(0, BLOCK_S)
    d = d_tile * BLOCK_D + tl.arange(0, BLOCK_D)
    return (rest // n).to(tl.int64), rest % n, s_tile, s, d


@triton.jit
def load_tile(x_ptr, b, s, d, stride_xb, stride_xs, mask):
    offset = b * stride_xb + s.to(tl.int64)[:, None] * stride_xs + d[None, :]
    return tl.load(x_ptr + offset, mask=mask, other=0.0)


@triton.jit
def dots_kernel(
    grad_ptrs, value_ptrs, partial_ptr, mean_ptr,
    strides_gb, strides_gs, strides_vb, strides_vs, lengths, widths, first_columns, columns, s_tiles, d_tiles,
    E: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    b, encoder, s_tile, s, d = tile_of(program, s_tiles, d_tiles, E, BLOCK_S, BLOCK_D)
    for e in tl.static_range(E):
        if encoder == e:
            in_d = d < widths[e]
            mask = (s < lengths[e])[:, None] & in_d[None, :]
            G = load_tile(grad_ptrs[e], b, s, d, strides_gb[e], strides_gs[e], mask).to(tl.float32)
            V = load_tile(value_ptrs[e], b, s, d, strides_vb[e], strides_vs[e], mask).to(tl.float32)
            tl.store(partial_ptr + program, tl.sum(G * V))
            mean_offset = (b * s_tiles + s_tile) * columns + first_columns[e] + d
            tl.store(mean_ptr + mean_offset, tl.sum(V, 0) / lengths[e], mask=in_d)


@triton.jit
def blend_kernel(
    in_ptrs, out_ptrs, w_ptr, ds_ptr, vector_ptrs,
    strides_ib, strides_is, strides_ob, strides_os, lengths, widths, s_tiles, d_tiles,
    N: tl.constexpr, E: tl.constexpr, SHIFTED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, index, _, s, d = tile_of(tl.program_id(0), s_tiles, d_tiles, N, BLOCK_S, BLOCK_D)
    for i in tl.static_range(N):
        if index == i:
            in_d = d < widths[i]
            mask = (s < lengths[i])[:, None] & in_d[None, :]
            w = tl.load(w_ptr + b * E + i % E)
            out = w * load_tile(in_ptrs[i], b, s, d, strides_ib[i], strides_is[i], mask).to(tl.float32)
            if i < SHIFTED:
                vector = tl.load(vector_ptrs[i] + d, mask=in_d, other=0.0).to(tl.float32)
                out += (tl.load(ds_ptr + b * E + i) * (vector / lengths[i]))[None, :]
            offset = b * strides_ob[i] + s.to(tl.int64)[:, None] * strides_os[i] + d[None, :]
            tl.store(out_ptrs[i] + offset, out.to(out_ptrs[i].dtype.element_ty), mask=mask)


class Launch(NamedTuple):
    """Tokens and channels of a program, and its warps."""

    block_s: int
    block_d: int
    num_warps: int


DOTS = {80: Launch(64, 128, 8), 90: Launch(64, 128, 8), 100: Launch(64, 128, 8)}
BLEND = {80: Launch(32, 128, 4), 90: Launch(32, 128, 4), 100: Launch(32, 128, 4)}


def dots(grads: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``(<G_e, V_e> [B, E], mean_s(V_e) [B, D_1 + ... + D_E])`` per video, float32; the means encoder by encoder.

    Args:
        grads: G_e ``[B, S_e, D_e]`` of E encoders, any strides and dtypes; may be one tensor E times.
        values: V_e ``[B, S_e, D_e]``, any strides; lengths and widths may differ between encoders.
    """
    E, B, choice = len(values), values[0].shape[0], DOTS[capability()]
    grads, values = [unit_stride(grad) for grad in grads], [unit_stride(value) for value in values]
    if not wide(*grads, *values):
        # Elements that are loaded alone are each from an address in registers.
        choice = choice._replace(block_s=max(1, choice.block_s // 2))
    lengths, widths = tuple(value.shape[1] for value in values), tuple(value.shape[2] for value in values)
    s_tiles, d_tiles = cdiv(max(lengths), choice.block_s), cdiv(max(widths), choice.block_d)
    partials = torch.empty(B, E, s_tiles * d_tiles, dtype=torch.float32, device=values[0].device)
    means = torch.empty(B, s_tiles, sum(widths), dtype=torch.float32, device=values[0].device)
    dots_kernel[(partials.numel(),)](
        tuple(grads),
        tuple(values),
        partials,
        means,
        tuple(grad.stride(0) for grad in grads),
        tuple(grad.stride(1) for grad in grads),
        tuple(value.stride(0) for value in values),
        tuple(value.stride(1) for value in values),
        lengths,
        widths,
        tuple(sum(widths[:e]) for e in range(E)),
        sum(widths),
        s_tiles,
        d_tiles,
        E=E,
        BLOCK_S=choice.block_s,
        BLOCK_D=choice.block_d,
        num_warps=choice.num_warps,
    )
    return partials.sum(2), means.sum(1)


def blend(
    w: Tensor,
    *,
    grads: Sequence[Tensor] = (),
    ds: Tensor | None = None,
    vectors: Sequence[Tensor] = (),
    dvalues: Sequence[Tensor] = (),
    values: Sequence[Tensor] = (),
    weighed: Sequence[Tensor] = (),
) -> None:
    """Write ``dvalues[e] = w_e grads[e] + ds_e vectors[e] / S_e`` and ``weighed[e] = w_e values[e]``.

    Either may be left out: the first with grads, ds and vectors, the second with values. Computed in float32,
    rounded once to the dtype of what is written.

    Args:
        w: encoder weights ``[B, E]``, float32.
        grads: ``[B, S_e, D_e]`` of E encoders, any strides and dtypes; may be one tensor E times.
        ds: gradient of the scores ``[B, E]``, float32.
        vectors: ``[D_e]``, contiguous, any dtype.
        dvalues: ``[B, S_e, D_e]``, of unit channel stride; dvalues[e] may be grads[e] itself.
        values: ``[B, S_e, D_e]`` of E encoders, any strides.
        weighed: like ``dvalues``; weighed[e] may be values[e] itself.
    """
    inputs, outs = [unit_stride(x) for x in (*grads, *values)], (*dvalues, *weighed)
    N, E, B, choice = len(inputs), w.shape[1], w.shape[0], BLEND[capability()]
    lengths, widths = tuple(x.shape[1] for x in inputs), tuple(x.shape[2] for x in inputs)
    s_tiles, d_tiles = cdiv(max(lengths), choice.block_s), cdiv(max(widths), choice.block_d)
    w = w.contiguous()
    blend_kernel[(B * N * s_tiles * d_tiles,)](
        tuple(inputs),
        outs,
        w,
        w if ds is None else ds.contiguous(),
        tuple(vectors) or outs,
        tuple(x.stride(0) for x in inputs),
        tuple(x.stride(1) for x in inputs),
        tuple(out.stride(0) for out in outs),
        tuple(out.stride(1) for out in outs),
        lengths,
        widths,
        s_tiles,
        d_tiles,
        N=N,
        E=E,
        SHIFTED=len(vectors),
        BLOCK_S=choice.block_s,
        BLOCK_D=choice.block_d,
        # As above; here more threads hold them.
        num_warps=choice.num_warps * (1 if wide(*inputs, *outs) else 2),
    )
