"""What frozen encoders return for each video, computed once, before the epochs that read it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from merv_fast.errors import VideoError
from merv_fast.models.encoding import by_video
from merv_fast.models.identity import VideoKeys
from merv_fast.models.video_model import MervVideoModel
from merv_fast.runtime.cache import VideoCache
from merv_fast.runtime.cache.disk import DiskTier
from merv_fast.video import load_frames

__all__ = ["StoredFeatures", "encode_videos"]

logger = logging.getLogger("merv_fast")

CLIP: dict[str, Any] = {"clip_start_sec": 0.0, "clip_end_sec": None, "end_frame": None, "fps": None}
"""Whole videos, which is all that the data format knows."""

AT_ONCE = 8
"""Videos that are encoded together."""


@dataclass(frozen=True)
class StoredFeatures:
    """Where the features of each video are; small, so that workers may have a copy.

    Args:
        disk: the files.
        encoders: names of the encoders, in order.
        keys: of each video that could be read.
        faults: of each that could not, why.
    """

    disk: DiskTier
    encoders: tuple[str, ...]
    keys: dict[Path, str]
    faults: dict[Path, str]

    def of(self, video: Path) -> list[Tensor]:
        """E tensors [T_e, N_e, C_e].

        Raises:
            VideoError: the video could not be read.
            RuntimeError: the entry is no longer there.
        """
        if video in self.faults:
            raise VideoError(video, self.faults[video])
        entry = self.disk.get(self.keys[video])
        if entry is None:
            raise RuntimeError(f"{self.disk.folder}: the features of {video} are gone; was it cleared, or is it full?")
        return [entry[name] for name in self.encoders]


def encode_videos(
    model: MervVideoModel,
    videos: Sequence[Path],
    folder: Path,
    max_bytes: int,
    *,
    on_error: Literal["raise", "skip"] = "raise",
    workers: int = 0,
) -> StoredFeatures:
    """Features of all videos, those that the folder lacks computed; each process of a group takes its share of them.

    Keys hold the contents of video and encoders, so a folder serves every run with the same frozen encoders, and what
    ``merv-fast`` keeps elsewhere does not collide. All processes must see the same folder.

    Args:
        model: whose encoders run, in evaluation mode, on its device and under the autocast of the caller.
        videos: paths; one that occurs twice is encoded once.
        folder: made if need be.
        max_bytes: of all files in it.
        on_error: "skip" keeps why a video could not be read, "raise" raises it.
        workers: processes that decode; 0 decodes in this one.

    Raises:
        ValueError: the features do not fit into ``max_bytes``, or the folder cannot be written to.
        VideoError: a video cannot be read.
    """
    videos = list(dict.fromkeys(videos))
    need = len(videos) * bytes_of_features(model)
    if need > max_bytes:
        rule = f"at least the {need / 2**30:.1f} GiB that the features of {len(videos)} videos take"
        raise ValueError(f"encode_videos: max_bytes must be {rule}, got {max_bytes / 2**30:.1f} GiB")
    cache = VideoCache(0, folder, max_bytes, keep="features")
    disk = DiskTier(folder, max_bytes)
    state = PartialState()
    own = videos[state.process_index :: state.num_processes]
    count = max(model.config.num_frames)
    identity = VideoKeys(model, cache, CLIP, "pyav", count)
    if identity.now is None:
        raise ValueError("encode_videos: encoders must be in evaluation mode, got training mode")
    keys = {video: key for video in own if (key := identity.of(video)) is not None}
    faults: dict[Path, str] = {}
    # What has no key cannot be read; decoding says why.
    missing = [video for video in own if video not in keys or disk.get(keys[video]) is None]
    for done, frames in enumerate(batches(missing, count, workers)):
        good = {video: got for video, got in frames.items() if isinstance(got, Tensor) and video in keys}
        for video in frames.keys() - good.keys():
            fault = frames[video]
            if not isinstance(fault, VideoError):
                fault = VideoError(video, "changed while it was read")
            if on_error == "raise":
                raise fault
            faults[video] = fault.reason
        if good:
            encode_into(cache, model, [keys[video] for video in good], list(good.values()))
        logger.info("encoded %d of %d videos", min(AT_ONCE * (done + 1), len(missing)), len(missing))
    # Lists of pairs: what is gathered is joined with +.
    return StoredFeatures(
        disk,
        tuple(model.encoders),
        dict(gather_object(list(keys.items()))),
        dict(gather_object(list(faults.items()))),
    )


@torch.no_grad()
def encode_into(cache: VideoCache, model: MervVideoModel, keys: list[str], videos: list[Tensor]) -> None:
    """Encode videos, uint8 [F, 3, H, W] each, and keep them; copies of a video have one key."""
    by_key = dict(zip(keys, videos, strict=True))

    def make(wanted: list[str]) -> list[dict[str, Tensor]]:
        inputs = model.prepare([by_key[key] for key in wanted])
        return by_video(dict(zip(model.encoders, model.encode(inputs), strict=True)))

    cache.fetch(keys, make)


def batches(videos: Sequence[Path], count: int, workers: int) -> Iterator[dict[Path, Tensor | VideoError]]:
    """Frames uint8 [F, 3, H, W] of each video, or why there are none; `AT_ONCE` at a time."""
    loader = DataLoader(_Frames(videos, count), batch_size=AT_ONCE, num_workers=workers, collate_fn=dict)
    yield from loader


class _Frames(Dataset[tuple[Path, "Tensor | VideoError"]]):
    def __init__(self, videos: Sequence[Path], count: int) -> None:
        self.videos, self.count = videos, count

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> tuple[Path, Tensor | VideoError]:
        video = self.videos[index]
        try:
            return video, load_frames(video, self.count, decoder="pyav").movedim(-1, 1)
        except VideoError as error:
            return video, error


def bytes_of_features(model: MervVideoModel) -> int:
    """What the features of one video take at most, in the model's type."""
    configs = model.encoder_configs.values()
    return model.dtype.itemsize * sum(config.slots * config.tokens_per_slot * config.width for config in configs)
