"""What every process that works on a corpus has to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from merv_fast.integrations.corpus.encoder import Encoded, Keep, ModelSource
from merv_fast.integrations.corpus.items import Item
from merv_fast.integrations.corpus.rows import Row
from merv_fast.runtime.cache.digests import digest_json

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        folder: absolute path of the corpus folder.
        settings: as in its ``corpus.json``.
        source: of the model.
        keep: what is kept.
        clip: arguments of ``load_frames`` that say which part of a video.
        batch_size: videos that are encoded together.
        shard_size: videos of a shard.
        workers: that decode; None for the engine's choice, like ``actors``.
        actors: that encode.
    """

    folder: str
    settings: dict[str, Any]
    source: ModelSource
    keep: Keep
    clip: dict[str, Any]
    batch_size: int
    shard_size: int
    workers: int | None
    actors: int | None

    @property
    def count(self) -> int:
        """Frames that are read of a video."""
        return int(self.settings["frames"])

    @property
    def about(self) -> dict[str, str]:
        """What is the same in all rows."""
        return {"model": self.settings["model"], "encoding": digest_json(self.settings)[:32]}

    def failed(self, item: Item, reason: str) -> Row:
        """The row of a video that could not be decoded."""
        return Row.of(item, "failed", reason=reason, **self.about)

    def encoded(self, item: Item, size: tuple[int, int], encoded: Encoded) -> Row:
        """The row of a video with frames of that (height, width), before it has a shard."""
        specs = [
            {"name": f"{item.id}/{name}", "dtype": str(tensor.dtype).removeprefix("torch."), "shape": [*tensor.shape]}
            for name, tensor in encoded.tensors.items()
        ]
        weights, (height, width) = encoded.encoder_weights, size
        return Row.of(item, "ok", tensors=specs, encoder_weights=weights, height=height, width=width, **self.about)
