"""fuse_encoders: a launch for the scores of all encoders, another for the softmax and the weighted sum.

Scores: a program adds up BLOCK_S tokens by BLOCK_D channels of one encoder of one video, multiplies them with its
share of the query and writes one partial sum. Sum: a program makes BLOCK_S tokens by BLOCK_D channels of one video,
having the values of all encoders under way while it makes the weights from the partial sums.

Bytes: the values twice, as the softmax needs all tokens of a video before any is weighed, and the tokens once; for
one video of MERV in bf16 33.6 MB, 33.6 MB (from L2 where it holds them) and 8.4 MB. The backward reads the values and
the gradient once for <G, V> and the means, then the gradient again to write the values' gradients: see _blend.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from merv_fast.kernels._blend import Launch, blend, dots, load_tile, tile_of
from merv_fast.kernels._launch import Cost, capability, cdiv, power_of_2, unit_stride, wide
from merv_fast.kernels._weighing import encoder_weights, pick

__all__ = ["cost", "launch", "launch_backward"]


@triton.jit
def scores_kernel(
    value_ptrs, query_ptr, partial_ptr, strides_vb, strides_vs, lengths, chunks, D, s_tiles, d_tiles,
    E: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    b, encoder, _, s, d = tile_of(program, s_tiles, d_tiles, E, BLOCK_S, BLOCK_D)
    in_d = d < D
    for e in tl.static_range(E):
        if (encoder == e) & (program % (s_tiles * d_tiles) < chunks[e]):
            mask = (s < lengths[e])[:, None] & in_d[None, :]
            V = load_tile(value_ptrs[e], b, s, d, strides_vb[e], strides_vs[e], mask).to(tl.float32)
            query = tl.load(query_ptr + d, mask=in_d, other=0.0).to(tl.float32)
            tl.store(partial_ptr + program, tl.sum(tl.sum(V, 0) * query, 0))


@triton.jit
def load_tiles(x_ptrs, b, s, d, strides_xb, strides_xs, mask):
    tiles = ()
    for e in tl.static_range(len(x_ptrs)):
        tiles += (load_tile(x_ptrs[e], b, s, d, strides_xb[e], strides_xs[e], mask),)
    return tiles


@triton.jit
def sum_kernel(
    value_ptrs, bias_ptr, partial_ptr, out_ptr, weight_ptr, strides_vb, strides_vs, lengths, chunks,
    S, D, CHUNKS, s_tiles, d_tiles,
    E: tl.constexpr, E_POWER: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    b, _, _, s, d = tile_of(program, s_tiles, d_tiles, 1, BLOCK_S, BLOCK_D)
    mask = (s < S)[:, None] & (d < D)[None, :]
    values = load_tiles(value_ptrs, b, s, d, strides_vb, strides_vs, mask)
    w = encoder_weights(partial_ptr, bias_ptr, b, chunks, lengths, CHUNKS, E, E_POWER)
    if program % (s_tiles * d_tiles) == 0:
        e_range = tl.arange(0, E_POWER)
        tl.store(weight_ptr + b * E + e_range, w, mask=e_range < E)
    out = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for e in tl.static_range(E):
        out += pick(w, e, E_POWER) * values[e].to(tl.float32)
    out_offset = (b * S + s)[:, None] * D + d[None, :]
    tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty), mask=mask)


# Wide, for few partial sums: every program of the sum reads them all.
SCORES = {80: Launch(128, 128, 8), 90: Launch(128, 128, 8), 100: Launch(128, 128, 8)}
# One load of 16 bytes a thread and encoder: with two, eight encoders of an odd width spill.
SUM = {80: Launch(8, 256, 8), 90: Launch(8, 256, 8), 100: Launch(8, 256, 8)}


def launch(values: Sequence[Tensor], query: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """fuse_encoders of ``values``, E tensors ``[B, S or 1, D]``."""
    values = [unit_stride(value) for value in values]
    lengths = tuple(value.shape[1] for value in values)
    E, (B, _, D), S = len(values), values[0].shape, max(lengths)
    strides_vb, strides_vs = tuple(value.stride(0) for value in values), tuple(value.stride(1) for value in values)

    choice = SCORES[capability()]
    s_tiles, d_tiles = cdiv(S, choice.block_s), cdiv(D, choice.block_d)
    chunks = tuple(cdiv(length, choice.block_s) * d_tiles for length in lengths)
    partials = torch.empty(B, E, max(chunks), dtype=torch.float32, device=query.device)
    scores_kernel[(partials.numel(),)](
        tuple(values),
        query.contiguous(),
        partials,
        strides_vb,
        strides_vs,
        lengths,
        chunks,
        D,
        s_tiles,
        d_tiles,
        E=E,
        BLOCK_S=choice.block_s,
        BLOCK_D=choice.block_d,
        # Rows that are not aligned are read element by element, each from an address in registers.
        num_warps=choice.num_warps * (1 if wide(*values) else 2),
    )

    choice = SUM[capability()]
    s_tiles, d_tiles = cdiv(S, choice.block_s), cdiv(D, choice.block_d)
    tokens = torch.empty(B, S, D, dtype=query.dtype, device=query.device)
    weights = torch.empty(B, E, dtype=torch.float32, device=query.device)
    sum_kernel[(B * s_tiles * d_tiles,)](
        tuple(values),
        bias.contiguous(),
        partials,
        tokens,
        weights,
        strides_vb,
        # A single token stays where it is.
        tuple(stride if length == S else 0 for stride, length in zip(strides_vs, lengths, strict=True)),
        lengths,
        chunks,
        S,
        D,
        partials.shape[2],
        s_tiles,
        d_tiles,
        E=E,
        E_POWER=power_of_2(max(E, 2)),
        BLOCK_S=choice.block_s,
        BLOCK_D=choice.block_d,
        num_warps=choice.num_warps,
    )
    return tokens, weights


def launch_backward(
    grad_tokens: Tensor,
    grad_encoder_weights: Tensor,
    values: Sequence[Tensor],
    query: Tensor,
    encoder_weights: Tensor,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """fuse_encoders_backward: ``(dvalues, dquery, dbias)``."""
    E, (B, S, D), G = len(values), grad_tokens.shape, unit_stride(grad_tokens)
    lengths = [value.shape[1] for value in values]
    # In float32, as nothing is rounded between here and the values' gradients.
    G_sum = G.sum(1, keepdim=True, dtype=torch.float32) if min(lengths) < S else G
    grads = [G if length == S else G_sum for length in lengths]
    dw, means = dots(grads, values)
    # w * (dw - sum_e w_e dw_e), in one launch.
    ds = torch._softmax_backward_data(dw + grad_encoder_weights, encoder_weights, 1, torch.float32)
    dvalues = [torch.empty(value.shape, dtype=value.dtype, device=value.device) for value in values]
    blend(encoder_weights, grads=grads, ds=ds, vectors=[query.contiguous()] * E, dvalues=dvalues)
    dquery = (ds[:, :, None] * means.view(B, E, D)).sum((0, 1))
    return dvalues, dquery.to(query.dtype), ds.sum(0).to(query.dtype)


def cost(values: Sequence[Tensor], query: Tensor, bias: Tensor) -> Cost:
    """Each value read twice, added to the means and weighed, each token written once."""
    values_read = sum(value.numel() for value in values)
    B, S, D = values[0].shape[0], max(value.shape[1] for value in values), query.shape[0]
    return Cost(values_read + 2 * len(values) * B * S * D, (2 * values_read + B * S * D) * query.element_size())
