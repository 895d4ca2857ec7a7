"""What decides the visual tokens of a video, and the key under which they are kept."""

from __future__ import annotations

import os
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

import merv_fast
from merv_fast.models.video_model import MervVideoModel
from merv_fast.modules import attention_versions
from merv_fast.runtime.cache import VideoCache
from merv_fast.runtime.cache.digests import FileDigests, digest_json, digest_tensor
from merv_fast.video.base import DEFAULT_LIMITS
from merv_fast.video.choice import has_dali
from merv_fast.video.images import PICTURES
from merv_fast.video.sampling import clip_bounds

__all__ = ["VideoKeys", "kept_parts"]


class VideoKeys:
    """The keys under which a cache keeps what a model, as it is now, makes of videos.

    Args:
        model: what encodes.
        cache: whose digests of files and weights are used.
        clip: arguments of ``load_frames`` that say which part of a video.
        decoder: as asked for.
        count: frames that are read.
    """

    def __init__(
        self, model: MervVideoModel, cache: VideoCache, clip: dict[str, Any], decoder: str, count: int
    ) -> None:
        self.model, self.cache = model, cache
        self.clip = clip_identity(clip, decoder, count, model.device)
        self.now = model_identity(model, cache)

    def of(self, source: str | PathLike[str] | Tensor | None) -> str | None:
        """The key of a video; None where nothing can be kept of it."""
        video = None if self.now is None else video_identity(source, self.cache.files)
        return None if video is None else digest_json([self.now, self.clip, video])

    def still(self, key: str, source: str | PathLike[str] | Tensor | None) -> bool:
        """Whether neither model nor file have changed since `of` gave that key."""
        # Frames in memory are the caller's, who would have to change them while waiting.
        return self.now == model_identity(self.model, self.cache) and (
            isinstance(source, Tensor) or self.of(source) == key
        )


def kept_parts(model: MervVideoModel, keep: str) -> nn.Module:
    """The modules that make what is kept."""
    return model.encoders if keep == "features" else model


def model_identity(model: MervVideoModel, cache: VideoCache) -> str | None:
    """Digest of everything but the video: weights, their type, configuration, device, settings and versions.

    None while a module is in training mode, where two calls need not give the same. Weights go in by content, so that
    a model that was trained on, or has the same name and others, is another one; they are read once for it, and again
    when one was written to.
    """
    parts = kept_parts(model, cache.keep)
    if any(module.training for module in parts.modules()):
        return None
    devices = [model.device, *model.placement.devices.values()]
    tail = [model.config.arch_specifier, model.config.feature_fusion, model.tail.plan]
    return digest_json(
        {
            "keep": cache.keep,
            "weights": cache.weights.module(parts),
            # Classes and settings of all layers: one that was replaced by a quantised one is another.
            "modules": repr(parts),
            "encoders": repr(model.encoder_configs),
            "compiled": model.compiled,
            "attention": [attention_versions(encoder) for encoder in model.encoders.values()],
            "tail": tail if cache.keep == "tokens" else None,
            # Kinds of devices, not their numbers: GPUs of one kind compute the same.
            "arithmetic": [arithmetic(device, model.dtype) for device in devices],
            "versions": versions(),
        }
    )


def video_identity(source: str | PathLike[str] | Tensor | None, files: FileDigests) -> str | None:
    """Digest of what is in a video; None of a path that cannot be read as a video is.

    A file counts by its bytes and the suffix by which it is opened, a folder by its pictures and their names, frames
    by their bytes.
    """
    if source is None:
        return "none"
    if isinstance(source, Tensor):
        return digest_tensor(source)
    path = os.fsdecode(source)
    try:
        if os.path.isdir(path):
            return files.folder(path, PICTURES)
        if os.path.getsize(path) > DEFAULT_LIMITS.max_bytes:
            return None
        return files.file(path) + os.path.splitext(path)[1].lower()
    except (OSError, ValueError):
        # Opening it will say what is wrong.
        return None


def clip_identity(clip: dict[str, Any], decoder: str, count: int, device: torch.device) -> list[Any]:
    """Which frames are read, and by what."""
    bounds = clip_bounds(clip["clip_start_sec"], clip["clip_end_sec"])
    on_cpu = device.type == "cpu" and decoder == "auto"
    return [bounds, clip["end_frame"], clip["fps"], "pyav" if on_cpu else decoder, count]


def arithmetic(device: torch.device, dtype: torch.dtype) -> list[Any]:
    """What may change the rounding of a result: the processor, the types, and PyTorch's settings for them."""
    backends: Any = torch.backends  # whose submodules are made at run time
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    if device.type == "cuda":
        chip = torch.cuda.get_device_name(device)
        precisions = [backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision]
    else:
        chip = torch.backends.cpu.get_cpu_capability()
        precisions = [backends.mkldnn.matmul.fp32_precision, backends.mkldnn.conv.fp32_precision]
    return [device.type, chip, dtype, autocast, torch.are_deterministic_algorithms_enabled(), *precisions]


def versions() -> list[Any]:
    """What would compute the result."""
    import av

    return [merv_fast.__version__, torch.__version__, av.__version__, has_dali()]
