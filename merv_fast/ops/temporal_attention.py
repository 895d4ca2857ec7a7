"""temporal_attention: let each patch attend to itself in the other slots of its window.

    qkv  [B*T, N, 3*C]   float64 | float32 | bfloat16 | float16, any strides; q, k, v side by side, C each,
                         heads contiguous inside: channel h*d .. (h+1)*d of each is head h, d = C / heads
    out  [B*T, N, C]     qkv.dtype, contiguous; scores, softmax and sums in float32 (float64 for float64)

For patch n, head h and every window of w consecutive slots, with q, k, v [w, d]:

    P   = softmax(q k^T / sqrt(d)),   out = P v

A sequence is w rows of qkv, N * 3C apart: no transposed copy is needed.

Backward, with G = dL/dout: dP = G v^T,  dS = P * (dP - rowsum(P * dP)) / sqrt(d),
    dq = dS k,   dk = dS^T q,   dv = P^T G.                    P is recomputed: nothing but qkv is kept.

Source: the temporal attention of LanguageBind's video tower (arXiv 2310.01852).
"""

from typing import Any

import torch
from torch import Tensor

from merv_fast.ops._autocast import outside_autocast, without_autocast
from merv_fast.ops._autograd import refuse_second_derivative
from merv_fast.ops._checks import check_count, check_floating
from merv_fast.ops._kernels import register_kernel

__all__ = ["temporal_attention"]


def temporal_attention(qkv: Tensor, heads: int, frames: int, window: int) -> Tensor:
    """Attend along the slots of each patch, from the packed ``qkv [B*T, N, 3*C]`` to ``[B*T, N, C]``.

    Args:
        qkv: float64, float32, bfloat16 or float16; the slots of a video are consecutive.
        heads: attention heads; must divide C.
        frames: T, the slots of a video.
        window: consecutive slots that see each other; must divide T.

    Raises:
        ValueError: a shape or count that does not fit.
        TypeError: qkv is not of one of the four dtypes.

    >>> temporal_attention(torch.tensor([[[0.0, 0.0, 1.0]], [[0.0, 0.0, 3.0]]]), 1, 2, 2).flatten()
    tensor([2., 2.])
    """
    op = "temporal_attention"
    check_floating(op, "qkv", qkv)
    for name, count in (("heads", heads), ("frames", frames), ("window", window)):
        check_count(op, name, count)
    if qkv.ndim != 3 or qkv.shape[2] < 1 or qkv.shape[2] % (3 * heads):
        shape = tuple(qkv.shape)
        raise ValueError(f"{op}: qkv must be [B*T, N, 3*C] with C divisible by {heads} heads, got shape {shape}")
    if qkv.shape[0] % frames:
        raise ValueError(f"{op}: qkv must hold whole videos of {frames} frames, got {qkv.shape[0]} frames")
    if frames % window:
        raise ValueError(f"{op}: window must divide {frames} frames, got {window}")
    with without_autocast(qkv):
        return torch.ops.merv_fast.temporal_attention.default(qkv, heads, window)


# No word of videos here: a window never spans two, so B*T rows are just rows / window windows.
torch.library.define("merv_fast::temporal_attention", "(Tensor qkv, SymInt heads, SymInt window) -> Tensor")
torch.library.define(
    "merv_fast::temporal_attention_backward",
    "(Tensor grad, Tensor qkv, SymInt heads, SymInt window) -> Tensor",
)


def reference(qkv: Tensor, heads: int, window: int) -> Tensor:
    """Softmax attention written out, over [windows, N, heads, window, d]."""
    q, k, v = _sequences(qkv, 3, heads, window)
    return _rows(_probabilities(q, k) @ v, qkv)


def reference_backward(grad: Tensor, qkv: Tensor, heads: int, window: int) -> Tensor:
    """The formulas above, packed as qkv is."""
    q, k, v = _sequences(qkv, 3, heads, window)
    (G,) = _sequences(grad, 1, heads, window)
    P = _probabilities(q, k)
    dP = G @ v.mT
    dS = P * (dP - (P * dP).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    return torch.cat([_rows(part, qkv) for part in (dS @ k, dS.mT @ q, P.mT @ G)], 2)


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q * q.shape[-1] ** -0.5 @ k.mT, -1)


def _sequences(packed: Tensor, parts: int, heads: int, window: int) -> tuple[Tensor, ...]:
    """[B*T, N, parts*C] -> ``parts`` tensors [windows, N, heads, window, d] in the dtype sums are made in."""
    rows, N, width = packed.shape
    wide = packed.to(torch.promote_types(packed.dtype, torch.float32))
    split = wide.reshape(rows // window, window, N, parts, heads, width // (parts * heads))
    return split.permute(3, 0, 2, 4, 1, 5).unbind(0)


def _rows(sequences: Tensor, like: Tensor) -> Tensor:
    """[windows, N, heads, window, d] -> [B*T, N, C] in the dtype of ``like``."""
    _, N, heads, _, d = sequences.shape
    return sequences.permute(0, 3, 1, 2, 4).reshape(len(like), N, heads * d).to(like.dtype).contiguous()


torch.library.impl("merv_fast::temporal_attention", "default", reference)
torch.library.impl("merv_fast::temporal_attention_backward", "default", reference_backward)
register_kernel("temporal_attention", reference)
register_kernel("temporal_attention_backward", reference_backward)


@torch.library.register_fake("merv_fast::temporal_attention")
def _fake(qkv: Tensor, heads: int, window: int) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


@torch.library.register_fake("merv_fast::temporal_attention_backward")
def _fake_backward(grad: Tensor, qkv: Tensor, heads: int, window: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, ctx.heads, ctx.window = inputs
    ctx.save_for_backward(qkv)


@outside_autocast
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (qkv,) = ctx.saved_tensors
    return (
        torch.ops.merv_fast.temporal_attention_backward.default(grad, qkv, ctx.heads, ctx.window),
        None,
        None,
    )


torch.library.register_autograd("merv_fast::temporal_attention", _backward, setup_context=_keep)
refuse_second_derivative("temporal_attention_backward")
