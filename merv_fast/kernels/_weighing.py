"""The softmax over encoders, from partial sums of their scores: a few kilobytes that every program reads again.

Each program that needs the weights of a video computes them itself, in the same order, hence to the same bits:
that spares a launch between the scores and their use, and a wait of the whole grid.
"""

import triton
import triton.language as tl

__all__ = ["encoder_scores", "encoder_weights", "pick", "softmax"]

BLOCK = tl.constexpr(128)


@triton.jit
def spread(values, e, E: tl.constexpr):
    """The tuple of E numbers as a tensor over ``e``, zero from E on."""
    out = tl.zeros_like(e)
    for i in tl.static_range(E):
        out = tl.where(e == i, values[i], out)
    return out


@triton.jit
def encoder_scores(partial_ptr, offset_ptr, b, chunks, S, CHUNKS, E: tl.constexpr, E_POWER: tl.constexpr):
    """sum(partials[b, e, :chunks[e]]) / S[e] + offsets[e], float32 [E_POWER], -inf from E on.

    partials [B, E, CHUNKS] float32, contiguous; offsets [E] of any dtype; b int64; chunks and S are tuples of E
    ints; E_POWER is the next power of two of max(E, 2).
    """
    e = tl.arange(0, E_POWER)
    counts = spread(chunks, e, E)
    totals = tl.zeros((E_POWER, BLOCK), tl.float32)
    for first in range(0, CHUNKS, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        offset = (b * E + e)[:, None] * CHUNKS + chunk[None, :]
        totals += tl.load(partial_ptr + offset, mask=chunk[None, :] < counts[:, None], other=0.0)
    # Past E: 0 / 1, not 0 / 0, though it is masked below.
    means = tl.sum(totals, 1) / tl.where(e < E, spread(S, e, E), 1).to(tl.float32)
    scores = means + tl.load(offset_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    return tl.where(e < E, scores, float("-inf"))


@triton.jit
def softmax(scores, E: tl.constexpr, E_POWER: tl.constexpr):
    """Of scores that are -inf from E on, where it is zero. Not finite where torch.softmax is not."""
    e = tl.arange(0, E_POWER)
    # The largest score of a NaN, +inf or only -inf turns every exponential or their sum into NaN.
    exponentials = tl.where(e < E, tl.exp(scores - tl.max(scores, 0)), 0.0)
    return tl.where(e < E, exponentials / tl.sum(exponentials, 0), 0.0)


@triton.jit
def encoder_weights(partial_ptr, offset_ptr, b, chunks, S, CHUNKS, E: tl.constexpr, E_POWER: tl.constexpr):
    """The softmax of `encoder_scores`."""
    return softmax(encoder_scores(partial_ptr, offset_ptr, b, chunks, S, CHUNKS, E, E_POWER), E, E_POWER)


@triton.jit
def pick(w, e, E_POWER: tl.constexpr):
    """w[e] of ``w [E_POWER]``, a scalar."""
    return tl.sum(tl.where(tl.arange(0, E_POWER) == e, w, 0.0), 0)
