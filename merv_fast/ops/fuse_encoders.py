"""fuse_encoders: weigh the encoders of a video by one query and sum their tokens.

    values[e]        [B, S_e, D]   float64 | float32 | bfloat16 | float16, any strides; S_e is S or 1
    query            [D]           values' dtype
    bias             [E]           values' dtype
    tokens           [B, S, D]     values' dtype, contiguous; accumulated in float32 (float64 for float64)
    encoder_weights  [B, E]        float32 (float64 for float64)

    score_e         = mean_s(V_e) . query + bias_e
    encoder_weights = softmax_e(score)
    tokens          = sum_e w_e V_e

A single token (S_e = 1) is repeated to S. Cross-attention of one projected query q to the encoders' mean
tokens is this with query = k_proj^T q / sqrt(width) and bias_e = q . (k_bias + k_proj pe_e) / sqrt(width):
neither depends on the video, so plain autograd carries their gradients to q and k_proj.

Backward, with G = dL/dtokens and g = dL/dencoder_weights, per video:
    dw_e = <G, V_e> + g_e,   ds = w * (dw - sum_e w_e dw_e),   dV_e = w_e G + ds_e query / S_e,
    dquery = sum ds_e mean_s(V_e),   dbias_e = sum ds_e         (both summed over videos)
where a repeated token stands for its repetitions: its G is summed over them.

Source: `cross_attention_avg_lq` of MERV (arXiv 2501.01426).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from merv_fast.ops._autocast import outside_autocast, without_autocast
from merv_fast.ops._autograd import refuse_second_derivative
from merv_fast.ops._checks import (
    check_alike,
    check_encoder_count,
    check_encoder_weighing,
    check_floating,
)
from merv_fast.ops._kernels import register_kernel

__all__ = ["fuse_encoders"]


def fuse_encoders(values: Sequence[Tensor], query: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Fuse ``values``, E tensors ``[B, S or 1, D]``, to ``(tokens [B, S, D], encoder_weights [B, E])``.

    Args:
        values: the projected tokens of 1 to 8 encoders; a single token is repeated to the others' length.
        query: ``[D]``, what the mean token of an encoder is multiplied with.
        bias: ``[E]``, added to the scores.

    Raises:
        ValueError: a shape, count or device that does not fit.
        TypeError: values are not of float64, float32, bfloat16 or float16, or not all of one dtype.

    >>> values = [torch.zeros(1, 2, 1), torch.full((1, 1, 1), 4.0)]
    >>> tokens, weights = fuse_encoders(values, torch.zeros(1), torch.zeros(2))
    >>> tokens.flatten(), weights
    (tensor([2., 2.]), tensor([[0.5000, 0.5000]]))
    """
    op = "fuse_encoders"
    check_encoder_count(op, "values", values)
    first = values[0]
    check_floating(op, "values[0]", first)
    for e, value in enumerate(values):
        check_alike(op, f"values[{e}]", value, "values[0]", first)
        if value.ndim != 3 or 0 in value.shape[1:]:
            raise ValueError(f"{op}: values[{e}] must be [B, S, D], S and D at least 1, got shape {tuple(value.shape)}")
    B, S, D = first.shape[0], _length(values), first.shape[2]
    for e, value in enumerate(values):
        if value.shape[0] != B or value.shape[1] not in (1, S) or value.shape[2] != D:
            raise ValueError(f"{op}: values[{e}] must be [{B}, {S} or 1, {D}], got shape {tuple(value.shape)}")
    check_encoder_weighing(op, "values", values, D, query, bias)
    with without_autocast(values[0]):
        return torch.ops.merv_fast.fuse_encoders.default(list(values), query, bias)


torch.library.define(
    "merv_fast::fuse_encoders",
    "(Tensor[] values, Tensor query, Tensor bias) -> (Tensor tokens, Tensor encoder_weights)",
)
torch.library.define(
    "merv_fast::fuse_encoders_backward",
    "(Tensor grad_tokens, Tensor grad_encoder_weights, Tensor[] values, Tensor query, "
    "Tensor encoder_weights) -> (Tensor[] dvalues, Tensor dquery, Tensor dbias)",
)


def reference(values: list[Tensor], query: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """One pass over the values for their means, one for the sum; no stack of them exists."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = [value.mean(1, dtype=dtype) @ query.to(dtype) for value in values]
    encoder_weights = torch.softmax(torch.stack(scores, 1) + bias.to(dtype), 1)
    B, S, D = values[0].shape[0], _length(values), values[0].shape[2]
    tokens = encoder_weights.new_zeros(B, S, D)
    for w, value in zip(encoder_weights[:, :, None, None].unbind(1), values, strict=True):
        tokens += w * value
    return tokens.to(query.dtype), encoder_weights


def reference_backward(
    grad_tokens: Tensor,
    grad_encoder_weights: Tensor,
    values: list[Tensor],
    query: Tensor,
    encoder_weights: Tensor,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The formulas above; G summed over its tokens stands in for a repeated token's."""
    dtype = encoder_weights.dtype
    G = grad_tokens.to(dtype)
    grads = [G if value.shape[1] == G.shape[1] else G.sum(1, keepdim=True) for value in values]
    dw = torch.stack([(g * value).sum((1, 2)) for g, value in zip(grads, values, strict=True)], 1)
    ds = softmax_backward(dw + grad_encoder_weights, encoder_weights)
    means = [value.mean(1, dtype=dtype) for value in values]
    dquery = torch.stack([s @ mean for s, mean in zip(ds.unbind(1), means, strict=True)]).sum(0)
    dvalues = [
        (w * g + s * (query.to(dtype) / value.shape[1])).to(value.dtype).contiguous()
        for w, s, g, value in zip(
            encoder_weights[:, :, None, None].unbind(1),
            ds[:, :, None, None].unbind(1),
            grads,
            values,
            strict=True,
        )
    ]
    return dvalues, dquery.to(query.dtype), ds.sum(0).to(query.dtype)


def softmax_backward(dw: Tensor, encoder_weights: Tensor) -> Tensor:
    """Gradient of the scores [B, E] from that of their softmax."""
    return encoder_weights * (dw - (encoder_weights * dw).sum(1, keepdim=True))


def _length(values: Sequence[Tensor]) -> int:
    """S: the number of tokens of the encoders that do not have just one."""
    return next((value.shape[1] for value in values if value.shape[1] != 1), 1)


torch.library.impl("merv_fast::fuse_encoders", "default", reference)
torch.library.impl("merv_fast::fuse_encoders_backward", "default", reference_backward)
register_kernel("fuse_encoders", reference)
register_kernel("fuse_encoders_backward", reference_backward)


@torch.library.register_fake("merv_fast::fuse_encoders")
def _fake(values: list[Tensor], query: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    B, S, D = values[0].shape[0], _length(values), values[0].shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(B, S, D), query.new_empty(B, len(values), dtype=dtype)


@torch.library.register_fake("merv_fast::fuse_encoders_backward")
def _fake_backward(
    grad_tokens: Tensor,
    grad_encoder_weights: Tensor,
    values: list[Tensor],
    query: Tensor,
    encoder_weights: Tensor,
) -> tuple[list[Tensor], Tensor, Tensor]:
    dvalues = [value.new_empty(value.shape) for value in values]
    return dvalues, query.new_empty(query.shape), query.new_empty(len(values))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    values, query, _ = inputs
    ctx.save_for_backward(*values, query, output[1])


@outside_autocast
def _backward(ctx: Any, grad_tokens: Tensor, grad_encoder_weights: Tensor) -> tuple[Any, ...]:
    *values, query, encoder_weights = ctx.saved_tensors
    return torch.ops.merv_fast.fuse_encoders_backward.default(
        grad_tokens, grad_encoder_weights, values, query, encoder_weights
    )


torch.library.register_autograd("merv_fast::fuse_encoders", _backward, setup_context=_keep)
refuse_second_derivative("fuse_encoders_backward")
