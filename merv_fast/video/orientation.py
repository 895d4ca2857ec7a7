"""Which way up a stored picture is to be shown."""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

__all__ = ["Orientation"]


@dataclass(frozen=True)
class Orientation:
    """One of the eight right-angled ways to turn a picture: perhaps transpose, then perhaps flip."""

    transposed: bool = False
    flipped_rows: bool = False
    flipped_columns: bool = False

    @classmethod
    def of_frame(cls, frame: "VideoFrame") -> "Orientation":
        """From a video frame's display matrix; anything between right angles counts as the nearest one."""
        try:
            return cls.of_matrix(bytes(cast("Mapping[str, bytes]", frame.side_data)["DISPLAYMATRIX"]))
        except KeyError:
            return cls()
        except ValueError:
            # PyAV 18 stumbles over kinds of side data that it has no name for; only the angle is left.
            quarters = round(frame.rotation / 90) % 4
            return cls(quarters % 2 == 1, quarters in (1, 2), quarters in (2, 3))

    @classmethod
    def of_matrix(cls, matrix: bytes) -> "Orientation":
        """From FFmpeg's ``[[a, b, u], [c, d, v], [x, y, w]]``, which shows (p, q) at (ap + cq, bp + dq)."""
        a, b, _, c, d = struct.unpack("=5i", matrix[:20])
        return cls(True, b < 0, c < 0) if abs(b) > abs(a) else cls(False, d < 0, a < 0)

    @classmethod
    def of_exif(cls, data: bytes) -> "Orientation":
        """From the EXIF block, if there is one, at the head of a JPEG or PNG file."""
        marker = re.search(rb"Exif\0\0(?=II|MM)|eXIf(?=II|MM)", data[: 1 << 17])
        tiff = data[marker.end() :] if marker else b""
        order = "<" if tiff[:2] == b"II" else ">"
        try:
            (start,) = struct.unpack_from(f"{order}I", tiff, 4)
            (entries,) = struct.unpack_from(f"{order}H", tiff, start)
            for entry in range(start + 2, start + 2 + 12 * entries, 12):
                tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
                if tag == 0x0112:
                    return EXIF.get(value, cls())
        except struct.error:
            # A block cut short says nothing.
            pass
        return cls()

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Shown (height, width) of a stored picture."""
        return (width, height) if self.transposed else (height, width)

    def apply(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Turn [height, width, 3], as a view."""
        if self.transposed:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if self.flipped_rows else 1, :: -1 if self.flipped_columns else 1]


EXIF = {
    2: Orientation(False, False, True),
    3: Orientation(False, True, True),
    4: Orientation(False, True, False),
    5: Orientation(True, False, False),
    6: Orientation(True, False, True),
    7: Orientation(True, True, True),
    8: Orientation(True, True, False),
}
"""By the value of EXIF's tag 0x0112; 1 is upright."""
