"""Entries as a map-style dataset: what is decoded, and what becomes of an entry that cannot be read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor
from torch.utils.data import Dataset

from merv_fast.errors import VideoError
from merv_fast.training.data import Entry
from merv_fast.training.features import StoredFeatures
from merv_fast.training.tokens import EntryError, Tokens
from merv_fast.video import load_frames

__all__ = ["OnError", "Sample", "TrainingDataset"]

logger = logging.getLogger("merv_fast")

OnError = Literal["raise", "skip"]


@dataclass(frozen=True)
class Sample:
    """One entry, ready for the collator; of ``frames`` and ``features`` one is given, or neither for text alone.

    Args:
        tokens: ids and labels of the text.
        frames: uint8 [F, 3, H, W].
        features: E tensors [T_e, N_e, C_e].
        skipped: why entries before this one could not be read, in whose place it stands.
    """

    tokens: Tokens
    frames: Tensor | None = None
    features: list[Tensor] | None = None
    skipped: tuple[str, ...] = ()


class TrainingDataset(Dataset[Sample]):
    """Tokenises and decodes where it is asked: in the workers of a ``DataLoader``.

    Args:
        entries: the data.
        tokenise: from an entry to ids and labels.
        num_frames: frames of each video, the largest number that any encoder is given.
        video_tokens: visual tokens of a video, which count towards ``lengths``.
        on_error: "raise" what is wrong with a video or an entry, or "skip" it: the next one takes its place, and a
            warning says why. The reference takes a random one and goes on.
        features: what the encoders return for each video, instead of its frames.

    Raises:
        VideoError: a video cannot be read.
        EntryError: an entry cannot be trained on; also, with "skip", if none can.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        tokenise: Callable[[Entry], Tokens],
        num_frames: int,
        video_tokens: int = 0,
        on_error: OnError = "raise",
        features: StoredFeatures | None = None,
    ) -> None:
        self.entries, self.tokenise, self.num_frames, self.video_tokens = entries, tokenise, num_frames, video_tokens
        self.on_error, self.features = on_error, features

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}")
        skipped: list[str] = []
        for step in range(len(self)):
            try:
                sample = self._read(self.entries[(index + step) % len(self)])
            except (VideoError, EntryError) as error:
                if self.on_error == "raise":
                    raise
                logger.warning("skipped: %s", error)
                skipped.append(str(error))
            else:
                return replace(sample, skipped=tuple(skipped))
        raise EntryError(f"none of {len(self)} entries can be trained on; the last: {skipped[-1]}")

    @property
    def lengths(self) -> list[int]:
        """About how long each entry is, words and visual tokens: to group by, without reading any video."""
        return [
            sum(len(turn.text.split()) for turn in entry.turns) + self.video_tokens * (entry.video is not None)
            for entry in self.entries
        ]

    def _read(self, entry: Entry) -> Sample:
        tokens = self.tokenise(entry)
        if entry.video is None:
            return Sample(tokens)
        if self.features is not None:
            return Sample(tokens, features=self.features.of(entry.video))
        frames = load_frames(entry.video, self.num_frames, decoder="pyav")
        return Sample(tokens, frames=frames.movedim(-1, 1))
