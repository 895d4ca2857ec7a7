"""Long videos: windows of a clip, each encoded as a video of its own, their visual tokens one after another."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from merv_fast.errors import VideoError
from merv_fast.models.encoding import VideoEncoding
from merv_fast.models.requests import Source, VisualTokens, Window
from merv_fast.models.video_model import MervVideoModel
from merv_fast.runtime.cache import VideoCache
from merv_fast.runtime.cache.digests import signed
from merv_fast.runtime.trace import StageTimer
from merv_fast.video.base import Video
from merv_fast.video.open import clip_indices, open_video
from merv_fast.video.sampling import clip_bounds

__all__ = ["check_room", "check_windows", "encode_windows", "window_bounds"]


def encode_windows(
    model: MervVideoModel,
    source: Source,
    windows: int,
    clip: dict[str, Any],
    decoder: str,
    cache: VideoCache | None,
    timer: StageTimer,
) -> VisualTokens:
    """Visual tokens [windows * S, D] of a video, to the bit those of a call for each window's bounds.

    Frames and features of one window at a time are in memory, however long the video is.

    Args:
        model: what encodes.
        source: a file, GIF or folder of frames; or frames already decoded, as many as all windows together take.
        windows: at least 2.
        clip: arguments of ``load_frames`` that say which part of the video is cut into windows.
        decoder: as ``load_frames`` takes it.
        cache: where each window is looked for and kept, under the key of a call for its bounds.
        timer: gets the stages of ``VideoEncoding``.

    Raises:
        VideoError: the clip has fewer frames than windows, or is a single picture.
        ValueError: there is no video, or another number of decoded frames.
    """
    # The stages in their order, before opening the video adds to one of them.
    VideoEncoding(model, clip, decoder, cache).encode([], timer)
    encoded: list[VisualTokens] = []
    described: list[Window] = []
    for part, bounds, encoding in window_encodings(model, source, windows, clip, decoder, cache, timer):
        (visual,) = encoding.encode([part], timer)
        encoded.append(visual)
        described.append(Window(*bounds, visual.encoder_weights))
    return VisualTokens(
        torch.cat([visual.tokens for visual in encoded]),
        mean_weights([visual.encoder_weights for visual in encoded]),
        windows=tuple(described),
    )


def window_encodings(
    model: MervVideoModel,
    source: Source,
    windows: int,
    clip: dict[str, Any],
    decoder: str,
    cache: VideoCache | None,
    timer: StageTimer,
) -> Iterator[tuple[Source, tuple[float | None, float | None], VideoEncoding]]:
    """For each window: what to encode, its bounds in seconds, and how."""
    if source is None:
        raise ValueError(f"generate: windows must be 1 without a video, got {windows}")
    if isinstance(source, Tensor):
        encoding = VideoEncoding(model, clip, decoder, cache)
        if source.ndim != 4 or len(source) != windows * encoding.count:
            rule = f"uint8 [{windows * encoding.count}, H, W, 3], {encoding.count} for each of {windows} windows"
            raise ValueError(f"generate: frames must be {rule}, got {source.dtype} {list(source.shape)}")
        yield from ((part, (None, None), encoding) for part in source.split(encoding.count))
        return
    if clip["end_frame"] is not None and clip["end_frame"] >= 0:
        raise ValueError(f"generate: end_frame must be left out with windows, got {clip['end_frame']}")
    device = model.device if model.device.type == "cuda" else None
    opened = OpenedVideo(source, fps=clip["fps"], decoder=decoder, device=device)
    with timer.stage("decode"):
        video = opened()
        start, end = clip_bounds(clip["clip_start_sec"], clip["clip_end_sec"])
        # Raises where the clip lies outside the video.
        clip_indices(video, 1, start, end)
        bounds = window_bounds(video, windows, start, end)
    for window_start, window_end in bounds:
        part = clip | {"clip_start_sec": window_start, "clip_end_sec": window_end}
        yield source, (window_start, window_end), VideoEncoding(model, part, decoder, cache, opened)


def window_bounds(video: Video, windows: int, start: float, end: float | None) -> list[tuple[float, float]]:
    """Where windows start and end, in seconds: the frames of the clip in runs as equal as can be, in order.

    The first window starts where the clip does, the last ends where the clip or the video does, and each ends where
    the next one starts, which is the time of that one's first frame. So by the rule of ``sample_indices`` a frame of
    the clip is in one window and no other, and a window has at least one frame.

    Raises:
        VideoError: there are fewer frames than windows, or the video is a single picture.
    """
    if not video.fps:
        raise VideoError(video.path, f"is a single picture, which cannot be cut into {windows} windows")
    frames, fps = len(video), video.fps
    whole = time_of(frames, fps)
    end = whole if end is None else min(end, whole)
    first = math.floor(start * fps)
    held = math.floor(min(frames - 1, end * fps - 1)) + 1 - first
    if held < windows:
        part = f"{start:g} to {end:g} s of it"
        raise VideoError(video.path, f"must have a frame for each of {windows} windows, but {part} hold {max(held, 0)}")
    cuts = [time_of(first + held * index // windows, fps) for index in range(1, windows)]
    return list(pairwise([start, *cuts, end]))


def time_of(frame: int, fps: float) -> float:
    """The first moment, in seconds, that times ``fps``, as floats, is not before ``frame``."""
    seconds = frame / fps
    while seconds * fps < frame:
        seconds = math.nextafter(seconds, math.inf)
    return seconds


class OpenedVideo:
    """Opens a file once, and again only after it has changed.

    To open a long video is to read through all of it; what a cache keeps must still be of the file that is there.
    """

    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        self._path, self._options = path, options
        self._opened: tuple[tuple[int, ...] | None, Video] | None = None

    def __call__(self) -> Video:
        """The video as it is now."""
        signature = self._signature()
        if self._opened is None or signature is None or self._opened[0] != signature:
            self._opened = signature, open_video(self._path, **self._options)
        return self._opened[1]

    def _signature(self) -> tuple[int, ...] | None:
        """What changes when the file does; None of what is no file, or cannot be read, as opening it will say."""
        try:
            status = os.stat(self._path)
        except (OSError, ValueError):
            return None
        return signed(status) if stat.S_ISREG(status.st_mode) else None


def mean_weights(each: list[dict[str, float] | None]) -> dict[str, float] | None:
    """The mean share of each encoder; None where the fusion has no weights."""
    known = [weights for weights in each if weights is not None]
    return {name: math.fsum(weights[name] for weights in known) / len(known) for name in known[0]} if known else None


def check_windows(windows: Any) -> None:
    """Raise ValueError unless ``windows`` counts something."""
    if not isinstance(windows, int) or isinstance(windows, bool) or windows < 1:
        raise ValueError(f"generate: windows must be an int of at least 1, got {windows!r}")


def check_room(positions: int, windows: int, tokens: int, text: int, new: int) -> None:
    """Raise ValueError, which says how many windows would fit, unless they all do.

    Args:
        positions: of the language model.
        windows: of the video.
        tokens: visual tokens of each.
        text: tokens of the prompt.
        new: tokens of the answer at most.

    >>> check_room(positions=4096, windows=4, tokens=1024, text=40, new=64)
    Traceback (most recent call last):
    ValueError: generate: windows must be at most 3 for the language model's 4096 positions: 4 windows of 1024 tokens, \
40 of the prompt and 64 new ones are 4200
    """
    total = windows * tokens + text + new
    if total > positions:
        most = max((positions - text - new) // tokens, 0)
        raise ValueError(
            f"generate: windows must be at most {most} for the language model's {positions} positions: "
            f"{windows} windows of {tokens} tokens, {text} of the prompt and {new} new ones are {total}"
        )
