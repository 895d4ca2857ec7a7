"""The front end of a model, and what is kept of a video."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from merv_fast.models import load_vid
from merv_fast.models.encoding import by_video
from merv_fast.models.identity import kept_parts
from merv_fast.models.video_model import MervVideoModel
from merv_fast.runtime.cache.digests import WeightDigests, digest_json

__all__ = ["Encoded", "Encoder", "Keep", "ModelSource", "settings_of"]

Keep = Literal["tokens", "features"]
FORMAT = "merv_fast.corpus.1"


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from and where it runs, for this process or another.

    Args:
        model: as ``load_vid`` takes it, like ``llm_path`` and ``encoder_paths``.
        device: type of device or one of several.
        dtype: of weights and tensors.
        llm_path: see there.
        encoder_paths: see there.
    """

    model: str
    device: str
    dtype: torch.dtype
    llm_path: str | None = None
    encoder_paths: dict[str, str] = field(default_factory=dict)

    def load(self, device: str | None = None) -> MervVideoModel:
        """Encoders, projectors and fusion; the language model's weights stay in their file."""
        vidlm = load_vid(self.model, llm_path=self.llm_path, encoder_paths=self.encoder_paths)
        return vidlm.model.video_model.eval().to(device or self.device, dtype=self.dtype)

    def absolute(self) -> ModelSource:
        """The same for processes with other working directories."""
        model = os.path.abspath(self.model) if os.path.isdir(self.model) else self.model
        llm_path = None if self.llm_path is None else os.path.abspath(self.llm_path)
        encoder_paths = {key: os.path.abspath(path) for key, path in self.encoder_paths.items()}
        return ModelSource(model, self.device, self.dtype, llm_path, encoder_paths)


class Encoded(NamedTuple):
    """What is kept of one video: tensors on the CPU by name, and each encoder's weight or None."""

    tensors: dict[str, Tensor]
    encoder_weights: dict[str, float] | None


class Encoder:
    """From decoded frames to what is kept of them.

    Args:
        model: what encodes.
        keep: ``tokens``, what the language model sees, or ``features``, what the encoders return.
    """

    def __init__(self, model: MervVideoModel, keep: Keep) -> None:
        self.model, self.keep = model, keep

    @torch.inference_mode()
    def prepare(self, frames: Tensor) -> list[Tensor]:
        """E inputs [1, F_e, 3, S_e, S_e] of one video's frames, uint8 [F, H, W, 3], which are not needed any more."""
        return self.model.prepare(frames.movedim(-1, 1)[None])

    @torch.inference_mode()
    def encode(self, prepared: Sequence[list[Tensor]]) -> list[Encoded]:
        """Of several videos, in one batch, as ``MervModel.encode`` does it."""
        features = self.model.encode([torch.cat(parts) for parts in zip(*prepared, strict=True)])
        if self.keep == "features":
            batch = by_video(dict(zip(self.model.encoders, features, strict=True)))
            return [Encoded(own(entry), None) for entry in batch]
        output = self.model.fuse(features)
        tokens = by_video({"tokens": output.pooler_output})
        if output.encoder_weights is None:
            return [Encoded(own(entry), None) for entry in tokens]
        weights = output.encoder_weights.float().expand(len(prepared), -1).tolist()
        named = [dict(zip(self.model.encoders, row, strict=True)) for row in weights]
        return [Encoded(own(entry), row) for entry, row in zip(tokens, named, strict=True)]


def own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no memory, as a file of tensors wants them."""
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def settings_of(model: MervVideoModel, keep: Keep, clip: dict[str, Any], device: str) -> dict[str, Any]:
    """Everything that decides the tensors of a corpus, but for the videos.

    Versions of libraries and the make of a processor, which change roundings at most, are left out: a corpus may
    outlast them.
    """
    config = model.config
    tail = [config.arch_specifier, config.feature_fusion] if keep == "tokens" else None
    return {
        "format": FORMAT,
        "model": config.model_id,
        "keep": keep,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.device(device).type,
        "frames": max(config.num_frames),
        **clip,
        "configuration": digest_json([repr(model.encoder_configs), tail]),
        "weights": WeightDigests().module(kept_parts(model, keep)),
    }
