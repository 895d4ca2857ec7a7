"""A picture as a video of one repeated frame, and a folder of pictures as a video."""

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from merv_fast.errors import VideoError
from merv_fast.video.base import Put, Video, VideoLimits, check_file
from merv_fast.video.container import over_limit, pixel_guard
from merv_fast.video.orientation import Orientation
from merv_fast.video.picture import to_rgb
from merv_fast.video.progress import tick, time_limit

if TYPE_CHECKING:
    from av.video.codeccontext import VideoCodecContext

__all__ = ["PICTURES", "FolderVideo", "PictureVideo"]

PICTURES = (".jpg", ".jpeg", ".png")


class PictureVideo(Video):
    """One picture: a video of one frame that looks the same at any time (fps 0, infinite duration)."""

    def __init__(self, path: str, limits: VideoLimits) -> None:
        self.path = path
        self.fps, self.duration = 0.0, math.inf
        self._limits = limits
        pixels, codec = read_picture(path, limits)
        self.size = pixels.shape[:2]
        self.decoder = f"PyAV ({codec} picture)"

    def __len__(self) -> int:
        return 1

    def _read(self, wanted: list[int], put: Put) -> None:
        put(0, read_picture(self.path, self._limits)[0])


class FolderVideo(Video):
    """The .jpg, .jpeg and .png pictures of a folder, in natural order ("frame9" before "frame10").

    All must have the size of the first. Names that start with a dot are passed over.
    """

    def __init__(self, path: str, fps: float, limits: VideoLimits) -> None:
        self.path = path
        self.fps = float(fps)
        self._limits = limits
        try:
            names = [entry.name for entry in Path(path).iterdir()]
        except OSError as error:
            raise VideoError(path, f"cannot be read ({error.strerror})") from error
        self._names = sorted(
            (name for name in names if name.lower().endswith(PICTURES) and not name.startswith(".")),
            key=natural_key,
        )
        if not self._names:
            raise VideoError(path, f"is a folder without pictures ({', '.join(PICTURES)})")
        if len(self._names) > limits.max_frames:
            raise VideoError(
                path,
                f"holds {len(self._names)} pictures, more than {limits.max_frames} (VideoLimits.max_frames)",
            )
        pixels, codec = read_picture(str(Path(path, self._names[0])), limits)
        self.size = pixels.shape[:2]
        self.duration = len(self._names) / self.fps
        self.decoder = f"PyAV ({codec} pictures)"

    def __len__(self) -> int:
        return len(self._names)

    def _read(self, wanted: list[int], put: Put) -> None:
        with time_limit(self.path, self._limits.max_decode_seconds):
            for index in wanted:
                tick()
                path = str(Path(self.path, self._names[index]))
                pixels, _ = read_picture(path, self._limits)
                if pixels.shape[:2] != self.size:
                    raise VideoError(path, f"has height and width {pixels.shape[:2]}, the first picture {self.size}")
                put(index, pixels)


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key in which runs of digits count as numbers."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts] + [(-1, name)]


def read_picture(path: str, limits: VideoLimits) -> tuple[NDArray[np.uint8], str]:
    """Upright RGB [H, W, 3] of a JPEG or PNG file, and its codec.

    The bytes go straight to the decoder, so no name or content is ever taken for a pattern or a protocol.
    Chroma is upsampled by libswscale: at colour edges a JPEG may differ by some levels from libjpeg's.
    """
    import av
    from av.video.reformatter import VideoReformatter

    check_file(path, limits)
    size = os.path.getsize(path)
    if size > PIXEL_BYTES * limits.max_pixels + DESCRIPTION_BYTES:
        what = f"a picture of {limits.max_pixels} pixels (VideoLimits.max_pixels)"
        raise VideoError(path, f"has {size} bytes, more than {what} takes")
    data = Path(path).read_bytes()
    codec = next((codec for magic, codec in SIGNATURES.items() if data.startswith(magic)), None)
    if codec is None:
        raise VideoError(path, "is not a JPEG or PNG picture")
    width, height = SIZES[codec](data)
    if width * height > limits.max_pixels:
        raise VideoError(path, over_limit(limits, width, height))
    decoder = cast("VideoCodecContext", av.CodecContext.create(codec, "r"))
    decoder.options = {"max_pixels": str(pixel_guard(limits))}
    try:
        frames = decoder.decode(av.Packet(without_inflated(data))) + decoder.decode(None)
    except av.FFmpegError as error:
        raise VideoError(path, f"cannot be decoded (FFmpeg: {error.strerror})") from error
    if not frames:
        raise VideoError(path, "holds no frame that can be decoded")
    # FFmpeg's guard leaves room, and may have found another header.
    if frames[0].width * frames[0].height > limits.max_pixels:
        raise VideoError(path, over_limit(limits, frames[0].width, frames[0].height))
    pixels = to_rgb(frames[0], VideoReformatter(), (frames[0].height, frames[0].width))
    return Orientation.of_exif(data).apply(pixels), codec


def without_inflated(data: bytes) -> bytes:
    """A PNG file without the chunks that FFmpeg would inflate, however large they become; others as they are."""
    if not data.startswith(b"\x89PNG") or not any(name in data for name in INFLATED):
        return data
    kept, place = [data[:8]], 8
    while place < len(data):
        tick()
        chunk = data[place : place + 12 + int.from_bytes(data[place : place + 4])]
        if chunk[4:8] not in INFLATED:
            kept.append(chunk)
        place += len(chunk)
    return b"".join(kept)


def jpeg_size(data: bytes) -> tuple[int, int]:
    """(width, height) that the first frame header of a JPEG file states, or (0, 0)."""
    segments = re.compile(rb"\xff+([\x01-\xfe])(..)", re.DOTALL)
    place = 2
    while segment := segments.match(data, place):
        if segment[1][0] in FRAME_HEADERS:
            fields = data[segment.end() + 1 : segment.end() + 5]
            return int.from_bytes(fields[2:]), int.from_bytes(fields[:2])
        place = segment.end() - 2 + int.from_bytes(segment[2])
    return 0, 0


def png_size(data: bytes) -> tuple[int, int]:
    """(width, height) that the header of a PNG file states."""
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


PIXEL_BYTES = 8
"""16 bits in four channels."""

DESCRIPTION_BYTES = 2**24
"""Texts, colour profiles and previews."""

INFLATED = (b"zTXt", b"iTXt", b"iCCP")

# Start of frame; C4, C8 and CC are other segments.
FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
SIGNATURES = {b"\xff\xd8\xff": "mjpeg", b"\x89PNG\r\n\x1a\n": "png"}
SIZES = {"mjpeg": jpeg_size, "png": png_size}
