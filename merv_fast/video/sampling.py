"""Which frames of a video the encoders see: MERV's rule."""

import logging
import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["every", "sample_indices"]

logger = logging.getLogger("merv_fast")

Frames = TypeVar("Frames", Tensor, NDArray)


def sample_indices(
    frames: int,
    fps: float,
    count: int,
    clip_start_sec: float | None = 0.0,
    clip_end_sec: float | None = None,
    end_frame: int | None = None,
) -> list[int]:
    """Indices of ``count`` evenly spaced frames of a clip.

    They are ``linspace(start * fps, min(frames - 1, end * fps - 1), count)`` rounded down, where ``end`` is
    ``frames / fps`` if it is not given. With ``end_frame >= 0`` they are ``linspace(0, min(frames - 1,
    end_frame), count)`` instead and the bounds in seconds are not looked at. A bound that is None or NaN and
    a negative ``end_frame`` count as not given. Indices outside the video are moved to its nearest frame, and
    a warning says so; `merv_fast.video.load_frames` refuses bounds outside the video before it comes here.

    Args:
        frames: Frames in the video, at least 1.
        fps: Average frames per second, above 0.
        count: Indices to return, at least 1.
        clip_start_sec: Start of the clip in seconds.
        clip_end_sec: End of the clip in seconds.
        end_frame: Last frame of a clip that starts at frame 0.

    Raises:
        ValueError: An argument is out of its range, or a bound is infinite below or at the start.

    Source: ``load_video`` of MERV (princetonvisualai/merv).

    >>> sample_indices(frames=250, fps=25.0, count=4, clip_start_sec=1.0, clip_end_sec=3.5)
    [25, 45, 66, 86]
    """
    if frames < 1:
        raise ValueError(f"sample_indices: frames must be at least 1, got {frames}")
    if count < 1:
        raise ValueError(f"sample_indices: count must be at least 1, got {count}")
    if not 0 < fps < math.inf:
        raise ValueError(f"sample_indices: fps must be positive and finite, got {fps}")
    if end_frame is not None and end_frame >= 0:
        start, stop = 0.0, float(min(frames - 1, end_frame))
    else:
        clip_start, clip_end = clip_bounds(clip_start_sec, clip_end_sec)
        if math.isinf(clip_start) or clip_end == -math.inf:
            raise ValueError(f"sample_indices: clip bounds must be finite, got {clip_start} to {clip_end}")
        start = clip_start * fps
        stop = min(frames - 1, (frames / fps if clip_end is None else clip_end) * fps - 1)
    # numpy rounds towards minus infinity for an integer dtype; this is the reference's own call.
    wanted = np.linspace(start, stop, count, dtype=int)
    indices = wanted.clip(0, frames - 1)
    outside = int((indices != wanted).sum())
    if outside:
        logger.warning(
            "sample_indices: %d of %d indices (%d to %d) lie outside the video's %d frames; moved inside",
            outside,
            count,
            wanted.min(),
            wanted.max(),
            frames,
        )
    return indices.tolist()


def clip_bounds(start: float | None, end: float | None) -> tuple[float, float | None]:
    """The bounds in seconds, with None and NaN (TVQA has such clips) as not given."""
    start = 0.0 if start is None or math.isnan(start) else float(start)
    return start, None if end is None or math.isnan(end) else float(end)


def every(frames: Frames, count: int, dim: int = 0) -> Frames:
    """An encoder's share of the decoded frames: every ``F // count``-th along ``dim``, as a view.

    Args:
        frames: Tensor or array with F frames along ``dim``.
        count: Frames the encoder takes; must divide F.
        dim: The frame dimension.

    Raises:
        ValueError: ``count`` does not divide F (the reference's slice would then give another number).

    >>> import torch
    >>> every(torch.arange(32), 16)[:4]
    tensor([0, 2, 4, 6])
    """
    total = frames.shape[dim]
    if count < 1 or total % count:
        raise ValueError(f"every: count must divide the {total} frames, got {count}")
    return frames[(slice(None),) * (dim % frames.ndim) + (slice(None, None, total // count),)]
