"""Clips made at test time; each frame carries its index as eight black or white bars."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from torch import Tensor

BITS = 8


def bars(index: int, height: int, width: int) -> np.ndarray:
    """RGB [height, width, 3] whose vertical bars spell ``index``, lowest bit first."""
    bits = [(index >> bit) & 1 for bit in range(BITS)]
    picture = np.zeros((height, width, 3), np.uint8)
    for column in range(width):
        picture[:, column] = 255 * bits[column * BITS // width]
    return picture


def index_of(frame: Tensor) -> int:
    """The index that an upright frame [H, W, 3] spells."""
    height, width, _ = frame.shape
    centres = [(2 * bit + 1) * width // (2 * BITS) for bit in range(BITS)]
    return sum(int(frame[height // 2, column, 1] > 127) << bit for bit, column in enumerate(centres))


def indices_of(frames: Tensor) -> list[int]:
    return [index_of(frame) for frame in frames]


def write_clip(
    path: Path,
    codec: str = "libx264",
    count: int = 30,
    height: int = 64,
    width: int = 128,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    pts: Sequence[int] | None = None,
    rotation: tuple[float, bool, bool] | None = None,
    frames: Sequence[av.VideoFrame] | None = None,
    colour: tuple[int, int] | None = None,
    rate: int = 25,
    muxer: dict[str, str] | None = None,
) -> Path:
    """Encode ``count`` frames of bars, or ``frames``; ``colour`` is (AVColorSpace, AVColorRange)."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        if rotation:
            stream.set_display_rotation(*rotation)
        if colour:
            stream.colorspace, stream.color_range = colour
        for place in range(count if frames is None else len(frames)):
            if frames is None:
                frame = av.VideoFrame.from_ndarray(bars(place, height, width), "rgb24").reformat(format=pix_fmt)
            else:
                frame = frames[place]
            if pts is not None:
                frame.pts, frame.time_base = pts[place], Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
