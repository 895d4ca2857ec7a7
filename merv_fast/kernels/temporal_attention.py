"""temporal_attention: a program attends W query slots of R rows, a row being one head of one patch, to their window.

q [W, R, D] stays in registers and the key slots pass by as k, v [R, D]; a score is a sum of products over
channels. On the tensor cores the windows of several patches would share a product of 64 x 64, masked to its
diagonal blocks: with windows of 8 seven eighths of it are thrown away, and 0 * Inf carries a neighbour's value
across. Here Inf and NaN stay in their patch and head, float32 is exact and any window works.

A thread holds 16 bytes of a row in each slot, 8 or 16 in the backward, and an element of rows that are not
aligned. Where so much a lane makes a warp hold a whole row, all slots of a row lie in the same lanes, sums over
channels are shuffles and nothing goes through shared memory.

The softmax is online over blocks of KEYS slots; a window of one block is never rescaled.

The backward makes P twice: for each query's maximum, sum and delta = sum(P * dP), then for the gradients. Its loop
over key slots writes each dk and dv once, as the program holds every query of the window. A window longer than W
takes a launch for each W queries, which add dk and dv up in float32, one after the other: nothing is atomic.

Bytes: qkv and grad read once, results written once; what a program reads again is in a cache. MERV's 16 slots of
257 patches, w = 8, C = 1024 are in bf16 25.3 MB in, 8.4 MB out, 4 w C FLOPs a patch and slot: 0.13 GFLOP. The
backward: 33.7 MB in, 25.3 MB out, 14 w C FLOPs a patch and slot, two of its seven products made again: 0.47 GFLOP.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from merv_fast.kernels._launch import Cost, capability, cdiv, power_of_2, unit_stride

__all__ = ["cost", "launch", "launch_backward"]

LN2 = tl.constexpr(math.log(2))


@triton.jit
def row_offset(r, heads, stride_n, d: tl.constexpr):
    """Where row ``r`` of a slot starts: its patch, then its head."""
    return (r // heads).to(tl.int64) * stride_n + r % heads * d


@triton.jit
def load_slots(ptrs, slots, stride_b, mask):
    """Slots ``[W]`` of the rows at ``ptrs [R, D]`` in float32: [W, R, D]."""
    return tl.load(ptrs[None, :, :] + (slots * stride_b)[:, None, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_slot(ptrs, slot, stride_b, mask):
    return tl.load(ptrs + slot * stride_b, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def dot(x, y):
    """``x [W, R, D]`` with ``y [R, D]`` over channels: [W, R]."""
    return tl.sum(x * y[None, :, :], 2)


@triton.jit
def exponent_base(top):
    """What to take off the scores: their maximum, or 0 where all so far are -inf, as -inf - -inf is NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def attend_kernel(
    qkv_ptr, out_ptr, stride_b, stride_n, rows, heads, scale,
    window: tl.constexpr, d: tl.constexpr,
    W: tl.constexpr, R: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    chunks, blocks = tl.cdiv(rows, R), tl.cdiv(window, W)
    program = tl.program_id(0)
    first = (program // (chunks * blocks)).to(tl.int64) * window
    i = program // chunks % blocks * W + tl.arange(0, W)
    r, c = program % chunks * R + tl.arange(0, R), tl.arange(0, D)
    mask = (r < rows)[:, None] & (c < d)[None, :]
    mask_q = mask[None, :, :] & (i < window)[:, None, None]
    q_ptrs = qkv_ptr + row_offset(r, heads, stride_n, d)[:, None] + c[None, :]
    k_ptrs = q_ptrs + heads * d
    v_ptrs = k_ptrs + heads * d
    q = load_slots(q_ptrs, first + i, stride_b, mask_q) * scale
    top = tl.full((W, R), float("-inf"), tl.float32)
    total = tl.zeros((W, R), tl.float32)
    out = tl.zeros((W, R, D), tl.float32)
    for start in range(0, window, KEYS):
        before = top
        scores = ()
        for u in tl.static_range(KEYS):
            inside = start + u < window
            s = dot(q, load_slot(k_ptrs, first + start + u, stride_b, mask & inside))
            scores += (tl.where(inside, s, float("-inf")),)  # type: ignore[assignment]
            top = tl.maximum(top, scores[u])
        base = exponent_base(top)
        if window > KEYS:
            shrink = tl.exp2(before - base)
            total *= shrink
            out *= shrink[:, :, None]
        for u in tl.static_range(KEYS):
            v = load_slot(v_ptrs, first + start + u, stride_b, mask & (start + u < window))
            p = tl.exp2(scores[u] - base)
            total += p
            out += p[:, :, None] * v[None, :, :]
    out /= total[:, :, None]
    out_row = ((first + i)[:, None] * rows + r[None, :]) * d
    tl.store(out_ptr + out_row[:, :, None] + c[None, None, :], out.to(out_ptr.dtype.element_ty), mask=mask_q)


@triton.jit(do_not_specialize=["first_query"])
def attend_backward_kernel(
    grad_ptr, qkv_ptr, dqkv_ptr, sums_ptr, stride_gb, stride_gn, stride_b, stride_n, rows, heads, scale, first_query,
    window: tl.constexpr, d: tl.constexpr,
    W: tl.constexpr, R: tl.constexpr, D: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv go to dqkv; where sums, float32 [B*T, N, 2*C], are given, dk and dv are added to them instead."""
    program = tl.program_id(0)
    chunks, C = tl.cdiv(rows, R), heads * d
    first = (program // chunks).to(tl.int64) * window
    i = first_query + tl.arange(0, W)
    r, c = program % chunks * R + tl.arange(0, R), tl.max_contiguous(tl.arange(0, D), VECTOR)
    mask = (r < rows)[:, None] & (c < d)[None, :]
    in_i = (i < window)[:, None]
    mask_q = mask[None, :, :] & in_i[:, :, None]
    q_ptrs = qkv_ptr + row_offset(r, heads, stride_n, d)[:, None] + c[None, :]
    k_ptrs = q_ptrs + C
    v_ptrs = k_ptrs + C
    g_ptrs = grad_ptr + row_offset(r, heads, stride_gn, d)[:, None] + c[None, :]
    dq_ptrs = dqkv_ptr + row_offset(r, heads, 3 * C, d)[:, None] + c[None, :]
    stride_db = tl.cast(rows, tl.int64) * (3 * d)
    q = load_slots(q_ptrs, first + i, stride_b, mask_q) * scale
    g = load_slots(g_ptrs, first + i, stride_gb, mask_q)
    top = tl.full((W, R), float("-inf"), tl.float32)
    total = tl.zeros((W, R), tl.float32)
    delta = tl.zeros((W, R), tl.float32)
    for j in range(window):
        before = top
        s = dot(q, load_slot(k_ptrs, first + j, stride_b, mask))
        top = tl.maximum(top, s)
        base = exponent_base(top)
        shrink, p = tl.exp2(before - base), tl.exp2(s - base)
        total = total * shrink + p
        delta = delta * shrink + p * dot(g, load_slot(v_ptrs, first + j, stride_b, mask))
    share = 1 / total
    delta *= share
    base = exponent_base(top)
    dq = tl.zeros((W, R, D), tl.float32)
    for j in range(window):
        k = load_slot(k_ptrs, first + j, stride_b, mask)
        v = load_slot(v_ptrs, first + j, stride_b, mask)
        # Past the window a query is zero, but zero times Inf is not.
        p = tl.where(in_i, tl.exp2(dot(q, k) - base) * share, 0.0)
        ds = tl.where(in_i, p * (dot(g, v) - delta), 0.0)
        dq += ds[:, :, None] * k[None, :, :]
        dk = tl.sum(ds[:, :, None] * q, 0) * LN2
        dv = tl.sum(p[:, :, None] * g, 0)
        if sums_ptr is None:
            dk_ptrs = dq_ptrs + (first + j) * stride_db + C
            tl.store(dk_ptrs, dk.to(dqkv_ptr.dtype.element_ty), mask=mask)
            tl.store(dk_ptrs + C, dv.to(dqkv_ptr.dtype.element_ty), mask=mask)
        else:
            sum_ptrs = sums_ptr + row_offset(r, heads, 2 * C, d)[:, None] + c[None, :] + (first + j) * rows * (2 * d)
            tl.store(sum_ptrs, tl.load(sum_ptrs, mask=mask, other=0.0) + dk, mask=mask)
            tl.store(sum_ptrs + C, tl.load(sum_ptrs + C, mask=mask, other=0.0) + dv, mask=mask)
    rounded = (dq * (scale * LN2)).to(dqkv_ptr.dtype.element_ty)
    tl.store(dq_ptrs[None, :, :] + ((first + i) * stride_db)[:, None, None], rounded, mask=mask_q)


class Launch(NamedTuple):
    """Query slots that a program holds, key slots whose scores the forward holds (at most), and its warps."""

    slots: int
    keys: int
    num_warps: int


LAUNCHES = {80: Launch(8, 8, 2), 90: Launch(8, 8, 2), 100: Launch(8, 8, 2)}

HELD = {80: 32, 90: 64, 100: 32}
"""Elements of q, and of out, that a thread of the forward holds; twice as many spill on 80 and 100 in Triton 3.6."""


def launch(qkv: Tensor, heads: int, window: int) -> Tensor:
    """temporal_attention of ``qkv [B*T, N, 3*C]``."""
    choice = LAUNCHES[capability()]
    qkv = unit_stride(qkv)
    slots, N, width = qkv.shape
    d = width // (3 * heads)
    # A loop over keys carries sums, and masked channels carry masks: a thread then holds half as much.
    whole = window <= choice.keys and d == power_of_2(d)
    W, R, D = tile(window, d, vector(qkv, d), HELD[capability()] if whole else 32, choice)
    out = qkv.new_empty(slots, N, heads * d)
    attend_kernel[(slots // window * cdiv(window, W) * cdiv(N * heads, R),)](
        qkv,
        out,
        qkv.stride(0),
        qkv.stride(1),
        N * heads,
        heads,
        score_scale(d),
        window=window,
        d=d,
        W=W,
        R=R,
        D=D,
        # A loop carries its sums as well: half as many scores fit beside them.
        KEYS=window if window <= choice.keys else choice.keys // 2,
        num_warps=choice.num_warps,
    )
    return out


def launch_backward(grad: Tensor, qkv: Tensor, heads: int, window: int) -> Tensor:
    """temporal_attention_backward of ``grad [B*T, N, C]``, packed as ``qkv [B*T, N, 3*C]``."""
    choice = LAUNCHES[capability()]
    grad, qkv = unit_stride(grad), unit_stride(qkv)
    slots, N, width = qkv.shape
    d = width // (3 * heads)
    # Beside q there are g and dq: a thread can hold half of what it does in the forward.
    V = min(max(4, power_of_2(d) // 32), vector(qkv, d), vector(grad, d))
    W, R, D = tile(window, d, V, 32 if d == power_of_2(d) else 16, choice)
    dqkv = qkv.new_empty(qkv.shape)
    sums = None if window <= W else torch.zeros(slots, N, 2 * heads * d, dtype=torch.float32, device=qkv.device)
    for first_query in range(0, window, W):
        attend_backward_kernel[(slots // window * cdiv(N * heads, R),)](
            grad,
            qkv,
            dqkv,
            sums,
            grad.stride(0),
            grad.stride(1),
            qkv.stride(0),
            qkv.stride(1),
            N * heads,
            heads,
            score_scale(d),
            first_query,
            window=window,
            d=d,
            W=W,
            R=R,
            D=D,
            VECTOR=V,
            num_warps=choice.num_warps,
        )
    if sums is not None:
        dqkv[..., heads * d :] = sums
    return dqkv


class Tile(NamedTuple):
    """Query slots, rows and channels of a program, powers of two."""

    W: int
    R: int
    D: int


def tile(window: int, d: int, vector: int, most: int, choice: Launch) -> Tile:
    """A row to as many lanes as its vectors take, and at most ``most`` of its elements to a thread."""
    D = power_of_2(d)
    lanes = min(32, max(1, D // vector))
    W = min(choice.slots, power_of_2(window), max(1, most * lanes // D))
    return Tile(W, choice.num_warps * 32 // lanes, D)


def vector(x: Tensor, d: int) -> int:
    """Channels that a thread loads at once: 16 bytes where every row starts at a multiple of them."""
    channels = 16 // x.element_size()
    # Triton knows of a stride and of an address only whether 16 divides it.
    aligned = d % channels == 0 and all(n % 16 == 0 for n in (x.data_ptr(), x.stride(0), x.stride(1)))
    return channels if aligned else 1


def score_scale(d: int) -> float:
    """1 / sqrt(d), for scores that are exponents of 2."""
    return d**-0.5 / math.log(2)


def cost(qkv: Tensor, heads: int, window: int) -> Cost:
    """Two products over the window for each channel; qkv read once, out written once."""
    channels = qkv.numel() // 3
    return Cost(4 * window * channels, 4 * channels * qkv.element_size())
