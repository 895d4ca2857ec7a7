"""What every kind of video offers, and the limits it is opened under."""

import operator
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merv_fast.errors import VideoError

__all__ = ["DEFAULT_LIMITS", "Video", "VideoLimits", "check_file"]


@dataclass(frozen=True)
class VideoLimits:
    """Sizes beyond which a video is refused, checked before its frames are allocated.

    Args:
        max_pixels: Of one frame; the default is 8192 x 8192, 201 MB as RGB.
        max_frames: Of the video; the default is over nine hours at 30 frames a second.
        max_bytes: Of the file (of each picture of a folder); the default is 64 GiB.
        max_duration: Of the video, in seconds; the default is two days.
        max_decode_seconds: For opening the video, and again for each reading of frames; the default is an hour.
    """

    max_pixels: int = 8192 * 8192
    max_frames: int = 1_000_000
    max_bytes: int = 64 * 2**30
    max_duration: float = 2 * 24 * 3600.0
    max_decode_seconds: float = 3600.0

    def __post_init__(self) -> None:
        """Refuse limits that nothing can meet."""
        for name in ("max_pixels", "max_frames", "max_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"VideoLimits: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_duration", "max_decode_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"VideoLimits: {name} must be positive, got {getattr(self, name)}")


DEFAULT_LIMITS = VideoLimits()

Put = Callable[[int, NDArray[np.uint8]], None]


class Video(ABC):
    """Frames that can be read by index; made by `merv_fast.video.open_video`.

    It keeps no file open, so it can be pickled and read from several threads.

    Attributes:
        path: The file or folder.
        fps: Average frames per second.
        duration: Seconds; infinite for a single picture, which looks the same at any time.
        size: (height, width) of every frame, after rotation.
        decoder: What decodes it, for people to read.
        pinned: Whether frames on the CPU are put into page-locked memory, from which a GPU copies by itself.
    """

    path: str
    fps: float
    duration: float
    size: tuple[int, int]
    decoder: str
    pinned: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Frames that can be read, in presentation order."""

    @abstractmethod
    def _read(self, wanted: list[int], put: "Put") -> None:
        """Call ``put`` with each of the ascending, distinct ``wanted`` indices and its RGB frame [H, W, 3].

        In any order and from any thread; an index may come again, the last frame counts. Frames are copied.
        """

    def frames_at(self, indices: Iterable[int]) -> Tensor:
        """Read frames.

        Args:
            indices: F frame numbers in presentation order, from 0; in any order, with repeats. Each frame
                is decoded once, and only those asked for are held in memory.

        Returns:
            uint8 [F, H, W, 3], RGB, on the CPU.

        Raises:
            ValueError: An index is not in ``0 .. len - 1``.
            VideoError: The file cannot be decoded.
        """
        wanted = self._checked(indices)
        position: dict[int, int] = {}
        for place, index in enumerate(wanted):
            position.setdefault(index, place)
        frames = empty_frames((len(wanted), *self.size, 3), self.pinned)
        target = frames.numpy()
        if wanted:
            self._read(sorted(position), lambda index, frame: np.copyto(target[position[index]], frame))
        for place, index in enumerate(wanted):
            if position[index] != place:
                np.copyto(target[place], target[position[index]])
        return frames

    def _checked(self, indices: Iterable[int]) -> list[int]:
        """The indices as a list; raise ValueError if one is outside the video."""
        wanted = [operator.index(index) for index in indices]
        outside = next((index for index in wanted if not 0 <= index < len(self)), None)
        if outside is not None:
            raise ValueError(f"frames_at: indices must lie in 0..{len(self) - 1}, got {outside}")
        return wanted


def empty_frames(shape: tuple[int, ...], pinned: bool) -> Tensor:
    """A new uint8 tensor on the CPU."""
    if pinned:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
    # NumPy asks for huge pages; the first touch of ordinary ones costs more than the copy.
    return torch.from_numpy(np.empty(shape, np.uint8))


def check_file(path: str, limits: VideoLimits) -> None:
    """Raise VideoError unless ``path`` is a readable, regular file of 1 to ``limits.max_bytes`` bytes."""
    try:
        # Without waiting: to open a pipe that nobody writes to would take forever.
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            status = os.fstat(file)
        finally:
            os.close(file)
    except OSError as error:
        raise VideoError(path, f"cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(path, "is not a regular file")
    if not status.st_size:
        raise VideoError(path, "is an empty file")
    if status.st_size > limits.max_bytes:
        raise VideoError(path, f"has {status.st_size} bytes, the limit is {limits.max_bytes} (VideoLimits.max_bytes)")
