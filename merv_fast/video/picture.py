"""From a decoded FFmpeg frame to RGB pixels."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from av.video.frame import VideoFrame
    from av.video.reformatter import VideoReformatter

__all__ = ["blacken_transparent", "to_rgb"]

UNSPECIFIED = 2
# AVColorSpace values that libswscale converts: RGB, BT.709, -, FCC, BT.470BG, SMPTE 170M, 240M, BT.2020.
CONVERTIBLE = frozenset({0, 1, UNSPECIFIED, 4, 5, 6, 7, 9})


def to_rgb(frame: "VideoFrame", reformatter: "VideoReformatter", size: tuple[int, int]) -> NDArray[np.uint8]:
    """RGB [height, width, 3] of ``frame``, scaled to ``size`` if its own differs.

    The matrix (BT.601, BT.709, BT.2020 ...) and the range (limited, full) are those the frame names. Where it
    names none, libswscale's defaults hold: BT.601 and limited range (full for the ``yuvj`` formats); a matrix
    that libswscale does not know counts as none. More than 8 bits are scaled to 8; alpha is dropped.
    """
    if frame.colorspace not in CONVERTIBLE:
        frame.colorspace = UNSPECIFIED
    height, width = size
    (plane,) = reformatter.reformat(frame, width=width, height=height, format="rgb24").planes
    # Where it lies: to_ndarray would copy it.
    return np.ndarray((height, width, 3), np.uint8, memoryview(plane), strides=(plane.line_size, 3, 1))


def blacken_transparent(frame: "VideoFrame", rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``rgb`` with black where a GIF's ``frame`` shows nothing, as Pillow has it; FFmpeg has white there."""
    if frame.format.name != "bgra":
        return rgb
    height, width, _ = rgb.shape
    return rgb * (frame.reformat(width=width, height=height).to_ndarray()[..., 3:] > 0)
