"""Attention over heads: what computes it is chosen once, for all blocks of an encoder, and called here."""

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

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
from merv_fast.modules.attention_choice import (
    CHOICES,
    AttentionChoice,
    HeadShapes,
    View,
    choose_fastest,
    choose_flash_attention,
)

__all__ = [
    "AttentionChoice",
    "HeadAttention",
    "attention",
    "attention_choices",
    "attention_of",
    "attention_shapes",
    "attention_versions",
    "check_attention",
    "set_attention",
]


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
        choice: why it is that.
    """

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.choose("sdpa")

    def choose(self, backend: str, choice: AttentionChoice | None = None) -> None:
        """Let ``backend`` compute it; what it needs to know of tensors is checked when they come."""
        self.compute, self.choice = load_backend(backend), choice or AttentionChoice(backend)
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
    | ``flash_attention`` | the newest of these three that can be imported and serves here | a GPU, half precision |
    | ``fastest`` | that which takes an encoder the least time here, all but ``eager`` | a GPU or the CPU |

    The last two are decided now, and `attention_of` names what they were decided to be, which stays when the module is
    moved or cast later. ``fastest`` is measured for one video at the shapes that the encoder's configuration gives,
    each backend compared with ``eager`` first; within 3 % it is ``sdpa``. What was measured is remembered for the
    process, and `attention_choices` has the times.

    Attention over frames alone is `ops.temporal_attention`, whatever is chosen here, and that of one query a slot, in
    attention pooling, stays with ``sdpa``: there is nothing to gain.

    Args:
        module: an encoder, or anything that holds encoders.
        backend: one of these names.
        placed: whether the module is where, and in the dtype in which, it will run. If not, that is left to its first
            call, and nothing can be measured.

    Raises:
        ValueError: no such backend, no attention in ``module``, or a device, dtype or head size that does not fit; or
            for ``fastest`` weights that are not placed yet, or attention outside of encoders.
        ImportError: the package of the backend is missing.
        RuntimeError: the backend failed at a small attention here, or computed it wrongly; or ``fastest`` was asked for
            while a CUDA graph is captured.

    Example:
        >>> from merv_fast.encoders import build_encoder, encoder_config
        >>> with torch.device("meta"):
        ...     encoder = build_encoder(encoder_config("dinov2-video-all-tokens", 16))
        >>> set_attention(encoder, "eager")
        >>> attention_of(encoder)
        'eager'
    """
    for owner, choice in _decide(module, backend, placed):
        for part in _parts(owner):
            part.choose(choice.name, choice)


def check_attention(module: nn.Module, backend: str, *, placed: bool = True) -> None:
    """Raise what `set_attention` would raise."""
    _decide(module, backend, placed)


def attention_of(module: nn.Module) -> str:
    """The backend that was chosen for ``module``; several, with commas, where its blocks differ."""
    return ", ".join(sorted({part.backend for part in _parts(module)}))


def attention_versions(module: nn.Module) -> list[str]:
    """The backends in ``module``, each with the version of its package."""
    names = sorted({part.backend for part in _parts(module)})
    return [f"{name} {backend_version(name) or ''}".strip() for name in names]


def attention_choices(module: nn.Module) -> list[AttentionChoice]:
    """Why the backends in ``module`` are what they are, and how long each takes where that was measured.

    Of an encoder it is one. Times are of the device and dtype in which the encoder was when it was measured.
    """
    found: list[AttentionChoice] = []
    for part in _parts(module):
        if part.choice not in found:
            found.append(part.choice)
    return found


def attention_shapes(encoder: nn.Module) -> list[tuple[HeadShapes, int]]:
    """Shapes and strides of the heads that an encoder makes of one video, each with how many blocks do so.

    They are found by running an encoder of its configuration on the ``meta`` device. Attention over frames alone and
    that of one query a slot, which no backend is chosen for, are not among them.

    Args:
        encoder: what can be made again from its ``config``, which has ``num_frames`` and ``image_size``.

    Example:
        >>> from merv_fast.encoders import build_encoder, encoder_config
        >>> with torch.device("meta"):
        ...     encoder = build_encoder(encoder_config("dinov2-video-all-tokens", 16))
        >>> [(heads.q.shape, blocks) for heads, blocks in attention_shapes(encoder)]
        [((16, 16, 261, 64), 23)]
    """
    kind: Any = type(encoder)
    return list(_shapes(kind, encoder.config))


@lru_cache(maxsize=64)
def _shapes(kind: Any, config: Any) -> tuple[tuple[HeadShapes, int], ...]:
    seen: Counter[HeadShapes] = Counter()

    def record(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen[HeadShapes(View.of(q), View.of(k), View.of(v))] += 1
        # Has the shape of the result.
        return q

    with torch.device("meta"), torch.no_grad():
        encoder = kind(config)
        for part in _parts(encoder):
            part.compute = record
        encoder(torch.empty(1, config.num_frames, 3, config.image_size, config.image_size))
    return tuple(seen.items())


def _decide(module: nn.Module, backend: str, placed: bool) -> list[tuple[nn.Module, AttentionChoice]]:
    """Modules, and what would be chosen for all attention in each."""
    head_sizes = {part.head_size for part in _parts(module)}
    if not head_sizes:
        raise ValueError(f"attention: module must hold attention, got {type(module).__name__}")
    device, dtype = _placement(module) if placed else (None, None)
    match backend:
        case "fastest":
            return [(encoder, _fastest(encoder, placed)) for encoder in _encoders(module)]
        case "flash_attention":
            return [(module, choose_flash_attention(head_sizes, device, dtype))]
        case _ if backend not in BACKENDS:
            rule = f"one of {', '.join((*CHOICES, *BACKENDS))}"
            raise ValueError(f"attention: backend must be {rule}, got {backend!r}")
    for head_size in head_sizes:
        check_backend(backend, head_size, device, dtype)
    return [(module, AttentionChoice(backend))]


def _fastest(encoder: nn.Module, placed: bool) -> AttentionChoice:
    device, dtype = _placement(encoder) if placed else (None, None)
    if device is None or dtype is None:
        rule = "where and in the dtype in which they will run for fastest, which is measured"
        raise ValueError(f"attention: weights must be {rule} (move and cast the model first), got some not placed yet")
    return choose_fastest(attention_shapes(encoder), device, dtype)


def _placement(module: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Where and in which dtype the attention of ``module`` would run now, as far as that is known."""
    weight = next(module.parameters(), None)
    if weight is None or weight.device.type == "meta":
        return None, None
    device = weight.device
    return device, torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype


def _encoders(module: nn.Module) -> list[nn.Module]:
    """What in ``module`` has a configuration that tells the shapes of its attention."""
    found = [part for part in module.modules() if hasattr(getattr(part, "config", None), "image_size")]
    if {id(part) for encoder in found for part in _parts(encoder)} != {id(part) for part in _parts(module)}:
        rule = "an encoder, or hold attention in encoders alone, whose shapes are known,"
        raise ValueError(f"attention: module must be {rule} for fastest, got {type(module).__name__}")
    return found


def _parts(module: nn.Module) -> Iterator[HeadAttention]:
    return (part for part in module.modules() if isinstance(part, HeadAttention))
