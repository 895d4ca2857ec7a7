"""Attention over heads: the one place where a backend is called."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["attention"]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention without a mask, scaled by ``1 / sqrt(d)``.

    Args:
        q: ``[..., heads, queries, d]``, any strides with a contiguous last dimension.
        k: ``[..., heads, keys, d]``, same dtype.
        v: ``[..., heads, keys, d]``, same dtype.

    Returns:
        ``[..., heads, queries, d]`` in the dtype of ``q``.

    Source: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, equation 1.
    """
    return scaled_dot_product_attention(q, k, v)
