"""Attention over heads: what computes it is chosen once, for all blocks of an encoder, and called here."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from merv_fast.modules.attention_backends import (
    BACKENDS,
    backend_version,
    check_backend,
    check_tensors,
    load_backend,
)

__all__ = ["HeadAttention", "attention", "attention_of", "attention_versions", "check_attention", "set_attention"]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention without a mask, scaled by ``1 / sqrt(d)``, by PyTorch's choice of kernel.

    Args:
        q: ``[..., heads, queries, d]``, any strides with a contiguous last dimension.
        k: ``[..., heads, keys, d]``, same dtype.
        v: ``[..., heads, keys, d]``, same dtype.

    Returns:
        ``[..., heads, queries, d]`` in the dtype of ``q``.

    Source: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, equation 1.
    """
    return scaled_dot_product_attention(q, k, v)


class HeadAttention(nn.Module):
    """Softmax attention over heads of ``head_size`` channels, by the backend that was chosen (``sdpa`` at first).

    It has no parameters and no buffers: a state dict does not show it.

    Attributes:
        backend: name of what computes it, a key of ``BACKENDS``.
    """

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.choose("sdpa")

    def choose(self, backend: str) -> None:
        """Let ``backend`` compute it; what it needs to know of tensors is checked when they come."""
        self.compute = load_backend(backend)
        self.backend, self.limited = backend, BACKENDS[backend].dtypes is not None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q [R, heads, queries, d]``, ``k, v [R, heads, keys, d]`` -> ``[R, heads, queries, d]``.

        Raises:
            ValueError, RuntimeError: the backend does not serve for such tensors.
        """
        if self.limited:
            # A model may have been moved or cast since the choice.
            if not len(q):
                # Packages refuse an empty batch.
                return attention(q, k, v)
            check_tensors(self.backend, self.compute, self.head_size, q.device, q.dtype)
        return self.compute(q, k, v)


def set_attention(module: nn.Module, backend: str, *, placed: bool = True) -> None:
    """Choose what computes the attention in the blocks of an encoder; there is no falling back to another.

    | backend | is | serves on |
    |---|---|---|
    | ``eager`` | the definition, in PyTorch's operators | everything |
    | ``sdpa`` | PyTorch's own choice, and the default | everything |
    | ``sdpa_flash``, ``sdpa_cudnn`` | one of PyTorch's kernels | a GPU, half precision (flash: also a CPU) |
    | ``sdpa_efficient`` | one of PyTorch's kernels | a GPU, up to float32 |
    | ``flash_attention_2``, ``_3``, ``_4`` | Dao-AILab/flash-attention | a GPU, half precision |
    | ``xformers`` | facebookresearch/xformers | a GPU, up to float32 |

    Attention over frames alone is `ops.temporal_attention`, whatever is chosen here, and that of one query a slot, in
    attention pooling, stays with ``sdpa``: there is nothing to gain.

    Args:
        module: an encoder, or anything that holds encoders.
        backend: one of these names.
        placed: whether the module is where, and in the dtype in which, it will run. If not, that is left to its first
            call.

    Raises:
        ValueError: no such backend, no attention in ``module``, or a device, dtype or head size that does not fit.
        ImportError: the package of the backend is missing.
        RuntimeError: the backend failed at a small attention here, or computed it wrongly.

    Example:
        >>> from merv_fast.encoders import build_encoder, encoder_config
        >>> with torch.device("meta"):
        ...     encoder = build_encoder(encoder_config("dinov2-video-all-tokens", 16))
        >>> set_attention(encoder, "eager")
        >>> attention_of(encoder)
        'eager'
    """
    check_attention(module, backend, placed=placed)
    for part in _parts(module):
        part.choose(backend)


def check_attention(module: nn.Module, backend: str, *, placed: bool = True) -> None:
    """Raise what `set_attention` would raise."""
    parts = list(_parts(module))
    if not parts:
        raise ValueError(f"attention: module must hold attention, got {type(module).__name__}")
    where, dtype = None, None
    weight = next(module.parameters(), None)
    if placed and weight is not None and weight.device.type != "meta":
        where, dtype = weight.device, weight.dtype
        if torch.is_autocast_enabled(where.type):
            dtype = torch.get_autocast_dtype(where.type)
    for head_size in {part.head_size for part in parts}:
        check_backend(backend, head_size, where, dtype)


def attention_of(module: nn.Module) -> str:
    """The backend that was chosen for ``module``; several, with commas, where its blocks differ."""
    return ", ".join(sorted({part.backend for part in _parts(module)}))


def attention_versions(module: nn.Module) -> list[str]:
    """The backends in ``module``, each with the version of its package."""
    names = sorted({part.backend for part in _parts(module)})
    return [f"{name} {backend_version(name) or ''}".strip() for name in names]


def _parts(module: nn.Module) -> Iterator[HeadAttention]:
    return (part for part in module.modules() if isinstance(part, HeadAttention))
