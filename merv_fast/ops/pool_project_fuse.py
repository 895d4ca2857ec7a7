"""pool_project_fuse: pool_project of every encoder, then fuse_encoders, never forming the encoders' tokens.

    xs[e]            [B, T_e, H_e*W_e, C_e]   float64 | float32 | bfloat16 | float16, any strides
    weights[e*L+l]   [out_l, in_l]            xs' dtype; L layers for each encoder in turn, the last D wide
    biases[e*L+l]    [out_l]                  xs' dtype
    query            [D]                      xs' dtype
    bias             [E]                      xs' dtype
    tokens           [B, t*h*w, D]            xs' dtype, contiguous; tokens in the order (slot, row, column)
    encoder_weights  [B, E]                   float32 (float64 for float64)

Let h_e [B, S, K_e] be encoder e's pooled tokens after all layers but the last, and (P_e, b_e) its last layer.
A mean over tokens commutes with a linear map, so fuse_encoders of P_e h_e + b_e is exactly

    a_e             = P_e^T query,   c_e = b_e . query + bias_e
    encoder_weights = softmax_e(mean_s(h_e) . a_e + c_e)
    tokens          = [w_1 h_1 | ... | w_E h_E] [P_1 | ... | P_E]^T + sum_e w_e b_e

and all last layers together are one matrix product. Means, scores and softmax are in float32 (float64 for
float64), the products in xs' dtype with float32 sums; h_e and w_e h_e are rounded to xs' dtype.

Backward, with G = dL/dtokens and g = dL/dencoder_weights, per video:
    Z_e  = G P_e,   dw_e = <Z_e, h_e> + b_e . sum_s G + g_e,   ds = w * (dw - sum_e w_e dw_e)
    dh_e = w_e Z_e + ds_e a_e / S
    dP_e = w_e G^T h_e + query (ds_e mean_s(h_e))^T,   db_e = w_e sum_s G + ds_e query    (summed over videos)
    dquery = sum_e ds_e (P_e mean_s(h_e) + b_e),       dbias_e = ds_e                     (summed over videos)
then back through the hidden layers and the pooling. h_e is recomputed: nothing but the inputs and w is kept.
Where dh_e is not asked for, as of frozen encoders and linear projectors, Z_e is good for nothing but <Z_e, h_e>, which
is <P_e, G^T h_e> too, a product that dP_e needs anyway.

Source: the tail of MERV (arXiv 2501.01426): projectors `avg`, `3davg`, fusion `cross_attention_avg_lq`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from merv_fast.ops._autocast import outside_autocast, without_autocast
from merv_fast.ops._autograd import refuse_second_derivative
from merv_fast.ops._checks import (
    check_alike,
    check_count,
    check_encoder_count,
    check_encoder_weighing,
    check_grid,
    check_layers,
    check_maps,
)
from merv_fast.ops._hidden_layers import hidden_layers
from merv_fast.ops._kernels import register_kernel
from merv_fast.ops._tail_backward import kernel_backward, reference_backward
from merv_fast.ops._tail_passes import score_vectors

__all__ = ["pool_project_fuse"]


def pool_project_fuse(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    query: Tensor,
    bias: Tensor,
    grids: Sequence[tuple[int, int]],
    out_grid: tuple[int, int],
    out_slots: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Pool, project and fuse feature maps: ``(tokens [B, t*h*w, D], encoder_weights [B, E])``.

    Args:
        xs: feature maps ``[B, T_e, H_e*W_e, C_e]`` of 1 to 8 encoders, tokens in row-major order.
        weights: ``[out, in]`` matrices as torch.nn.Linear has them, equally many layers for each encoder,
            encoder by encoder.
        biases: one ``[out]`` vector for each of ``weights``.
        query: ``[D]``, what an encoder's mean projected token is multiplied with.
        bias: ``[E]``, added to the scores.
        grids: (H_e, W_e), the token grid of a slot of each encoder.
        out_grid: (h, w), the token grid they are all pooled to.
        out_slots: t, the slots they are all pooled to; every slot on its own, and all T_e equal, if None.

    Raises:
        ValueError: a shape, count or device that does not fit.
        TypeError: xs[0] is not of one of the four dtypes, or the others are not of its dtype.

    >>> xs, one = [torch.ones(1, 1, 4, 1), torch.full((1, 1, 4, 1), 3.0)], torch.ones(1, 1)
    >>> query, bias = torch.zeros(1), torch.zeros(2)
    >>> pool_project_fuse(xs, [one, one], [one[0], one[0]], query, bias, [(2, 2), (2, 2)], (1, 1))
    (tensor([[[3.]]]), tensor([[0.5000, 0.5000]]))
    """
    op = "pool_project_fuse"
    check_encoder_count(op, "xs", xs)
    E, L = len(xs), len(weights) // len(xs)
    check_grid(op, "out_grid", out_grid)
    if len(grids) != E:
        raise ValueError(f"{op}: grids must be {E} pairs like xs, got {len(grids)}")
    if not weights or len(weights) % E:
        raise ValueError(f"{op}: weights must be equally many for each of {E} encoders, got {len(weights)}")
    if len(biases) != len(weights):
        raise ValueError(f"{op}: biases must be {len(weights)} tensors like weights, got {len(biases)}")
    for e, (x, grid) in enumerate(zip(xs, grids, strict=True)):
        own = slice(e * L, (e + 1) * L)
        check_maps(op, f"xs[{e}]", x, f"grids[{e}]", grid)
        check_alike(op, f"xs[{e}]", x, "xs[0]", xs[0])
        check_layers(op, f"xs[{e}]", x, e * L, weights[own], biases[own])
        if x.shape[0] != xs[0].shape[0]:
            raise ValueError(f"{op}: xs[{e}] must hold {xs[0].shape[0]} videos like xs[0], got {x.shape[0]}")
        if out_slots is None and x.shape[1] != xs[0].shape[1]:
            raise ValueError(f"{op}: xs[{e}] must hold {xs[0].shape[1]} slots like xs[0], got {x.shape[1]}")
        first, last = weights[L - 1].shape, weights[own][-1].shape
        if last[0] != first[0]:
            rule = f"[{first[0]}, in] like weights[{L - 1}]"
            raise ValueError(f"{op}: weights[{(e + 1) * L - 1}] must be {rule}, got shape {tuple(last)}")
    slots = xs[0].shape[1] if out_slots is None else out_slots
    check_count(op, "out_slots", slots)
    check_encoder_weighing(op, "xs", xs, weights[L - 1].shape[0], query, bias)
    flat_grids = [side for grid in grids for side in grid]
    with without_autocast(xs[0]):
        return torch.ops.merv_fast.pool_project_fuse.default(
            list(xs), list(weights), list(biases), query, bias, flat_grids, out_grid, slots
        )


# grids is flat: H_1, W_1, H_2, W_2, ...
torch.library.define(
    "merv_fast::pool_project_fuse",
    "(Tensor[] xs, Tensor[] weights, Tensor[] biases, Tensor query, Tensor bias, SymInt[] grids, "
    "SymInt[] out_grid, SymInt out_slots) -> (Tensor tokens, Tensor encoder_weights)",
)
# dxs is empty where no x needs a gradient: encoders are usually frozen.
torch.library.define(
    "merv_fast::pool_project_fuse_backward",
    "(Tensor grad_tokens, Tensor grad_encoder_weights, Tensor[] xs, Tensor[] weights, Tensor[] biases, "
    "Tensor query, Tensor encoder_weights, SymInt[] grids, SymInt[] out_grid, SymInt out_slots, "
    "bool needs_xs) -> (Tensor[] dxs, Tensor[] dweights, Tensor[] dbiases, Tensor dquery, Tensor dbias)",
)


def reference(
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    query: Tensor,
    bias: Tensor,
    grids: list[int],
    out_grid: list[int],
    out_slots: int,
) -> tuple[Tensor, Tensor]:
    """Scores from the means of the hidden tokens, then one product with all last layers."""
    dtype, L = torch.promote_types(query.dtype, torch.float32), len(weights) // len(xs)
    P, b = weights[L - 1 :: L], torch.stack(biases[L - 1 :: L]).to(dtype)
    q = query.to(dtype)
    hidden = []
    for e, x in enumerate(xs):
        own = slice(e * L, (e + 1) * L - 1)
        grid = grids[2 * e : 2 * e + 2]
        pooled = torch.ops.merv_fast.pool_tokens.default(x, grid, out_grid, out_slots).flatten(1, 2)
        hidden.append(hidden_layers(pooled, weights[own], biases[own]))
    vectors = score_vectors(P, query)
    scores = [h.mean(1, dtype=dtype) @ a for h, a in zip(hidden, vectors, strict=True)]
    encoder_weights = torch.softmax(torch.stack(scores, 1) + b @ q + bias.to(dtype), 1)
    weighed = zip(encoder_weights[:, :, None, None].unbind(1), hidden, strict=True)
    tokens = F.linear(torch.cat([(w * h).to(h.dtype) for w, h in weighed], 2), torch.cat(P, 1))
    return tokens.add_((encoder_weights @ b)[:, None]), encoder_weights


torch.library.impl("merv_fast::pool_project_fuse", "default", reference)
torch.library.impl("merv_fast::pool_project_fuse_backward", "default", reference_backward)
register_kernel("pool_project_fuse", reference)
register_kernel("pool_project_fuse_backward", reference_backward, kernel_backward)


@torch.library.register_fake("merv_fast::pool_project_fuse")
def _fake(
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    query: Tensor,
    bias: Tensor,
    grids: list[int],
    out_grid: list[int],
    out_slots: int,
) -> tuple[Tensor, Tensor]:
    B, S = xs[0].shape[0], out_slots * out_grid[0] * out_grid[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(B, S, query.shape[0]), query.new_empty(B, len(xs), dtype=dtype)


@torch.library.register_fake("merv_fast::pool_project_fuse_backward")
def _fake_backward(
    grad_tokens: Tensor,
    grad_encoder_weights: Tensor,
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    query: Tensor,
    encoder_weights: Tensor,
    grids: list[int],
    out_grid: list[int],
    out_slots: int,
    needs_xs: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    dxs, dweights, dbiases = ([t.new_empty(t.shape) for t in ts] for ts in (xs if needs_xs else [], weights, biases))
    return dxs, dweights, dbiases, query.new_empty(query.shape), query.new_empty(len(xs))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    xs, weights, biases, query, _, ctx.grids, ctx.out_grid, ctx.out_slots = inputs
    ctx.E, ctx.layers = len(xs), len(weights)
    ctx.save_for_backward(*xs, *weights, *biases, query, output[1])


@outside_autocast
def _backward(ctx: Any, grad_tokens: Tensor, grad_encoder_weights: Tensor) -> tuple[Any, ...]:
    *tensors, query, encoder_weights = ctx.saved_tensors
    xs, layers = tensors[: ctx.E], tensors[ctx.E :]
    needs_xs = any(ctx.needs_input_grad[0])
    dxs, dweights, dbiases, dquery, dbias = torch.ops.merv_fast.pool_project_fuse_backward.default(
        grad_tokens,
        grad_encoder_weights,
        xs,
        layers[: ctx.layers],
        layers[ctx.layers :],
        query,
        encoder_weights,
        ctx.grids,
        ctx.out_grid,
        ctx.out_slots,
        needs_xs,
    )
    return (dxs if needs_xs else [None] * ctx.E), dweights, dbiases, dquery, dbias, None, None, None


torch.library.register_autograd("merv_fast::pool_project_fuse", _backward, setup_context=_keep)
refuse_second_derivative("pool_project_fuse_backward")
