"""Which decoder reads a file, and why: chosen once, before a frame is decoded."""

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from merv_fast.errors import VideoError
from merv_fast.video.base import DEFAULT_LIMITS, VideoLimits
from merv_fast.video.boxes import check_samples
from merv_fast.video.container import open_container, packets
from merv_fast.video.images import PICTURES
from merv_fast.video.picture import CONVERTIBLE, UNSPECIFIED
from merv_fast.video.survey import Survey, survey

__all__ = ["DECODERS", "Choice", "Header", "choose_decoder", "read_header"]

DECODERS = ("auto", "pyav", "dali")
CPU = torch.device("cpu")

# Codecs and profiles by FFmpeg's names. NVDEC decodes more, in more than 8 bits too; what DALI makes of that was not
# looked at, so it stays with PyAV. VP8 has no profiles that FFmpeg names.
PROFILES = {
    "mpeg4": ("Simple Profile", "Advanced Simple Profile"),
    "h264": ("Baseline", "Constrained Baseline", "Main", "High"),
    "hevc": ("Main",),
    "vp8": None,
    "vp9": ("Profile 0",),
    "av1": ("Main",),
}
SINCE_VOLTA = frozenset(PROFILES) - {"av1"}

# By compute capability. Source: NVIDIA, NVDEC Application Note (Video Codec SDK 13.0), table "NVDEC Hardware
# Capabilities". A capability that is not here (Jetson has its own chips) decodes nothing as far as we know.
NVDEC_CODECS = {
    (7, 0): SINCE_VOLTA,
    (7, 5): SINCE_VOLTA,
    (8, 0): SINCE_VOLTA,
    (8, 6): SINCE_VOLTA | {"av1"},
    (8, 9): SINCE_VOLTA | {"av1"},
    (9, 0): SINCE_VOLTA,
    (10, 0): SINCE_VOLTA | {"av1"},
    (10, 3): SINCE_VOLTA | {"av1"},
    (12, 0): SINCE_VOLTA | {"av1"},
}

NVDEC_SIDES = (144, 4096)
"""Shortest and longest side that every engine takes for every codec but MPEG-4 (some take smaller or larger ones)."""

MPEG4_SIDES = (144, 1024)

DALI_CPU_CODECS = ("vp8", "vp9", "mjpeg")
"""What DALI 2.4 decodes without a GPU."""

DALI_MATRICES = (UNSPECIFIED, 5, 6)
"""AVColorSpace values that mean BT.601 to PyAV: DALI converts everything as BT.601."""

DALI_BYTES = 2 * 2**30
"""DALI is handed a whole file in memory."""


@dataclass(frozen=True)
class Header:
    """What a video file says of its pictures before any is decoded.

    Attributes:
        codec: FFmpeg's name.
        profile: Of the codec, or None where it has none.
        pixel_format: FFmpeg's name, or None where the file does not say.
        coded_size: (height, width) as stored.
        matrix: AVColorSpace.
        full_range: Whether black is 0 and not 16.
        streams: Streams of pictures, cover art included.
    """

    codec: str
    profile: str | None
    pixel_format: str | None
    coded_size: tuple[int, int]
    matrix: int
    full_range: bool
    streams: int


@dataclass(frozen=True)
class Choice:
    """``decoder`` ("pyav" or "dali") reads the file, and ``reason`` says why.

    With "dali" come the ``device`` that it decodes on and the ``survey`` that was needed to choose it.
    """

    decoder: str
    reason: str
    device: torch.device = CPU
    survey: Survey | None = field(default=None, repr=False, compare=False)


def choose_decoder(
    path: str | os.PathLike[str],
    decoder: str = "auto",
    device: torch.device | str | None = None,
    limits: VideoLimits = DEFAULT_LIMITS,
) -> Choice:
    """Choose what decodes ``path``.

    PyAV decodes everything, on the CPU. DALI is chosen where frames are wanted on a GPU whose NVDEC decodes the
    file's codec, and where it is certain to number and colour the frames as PyAV does.

    Args:
        path: A file or folder that `open_video` opens.
        decoder: "auto", "pyav" or "dali".
        device: Where frames are wanted; None is the CPU. On the CPU DALI decodes VP8, VP9 and MJPEG, if asked to.
        limits: As in `open_video`.

    Raises:
        VideoError: DALI was asked for and cannot decode this file; or the file is none.
        RuntimeError: DALI was asked for and is not installed.
        ValueError: No such decoder, or PyTorch does not see ``device``.

    >>> from merv_fast.assets import sample_clip
    >>> choose_decoder(sample_clip())
    Choice(decoder='pyav', reason='frames are wanted on the CPU', device=device(type='cpu'))
    """
    if decoder not in DECODERS:
        raise ValueError(f"open_video: decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
    wanted_on = check_device(device)
    if decoder == "pyav":
        return Choice("pyav", "asked for")
    if decoder == "auto" and wanted_on.type == "cpu":
        return Choice("pyav", "frames are wanted on the CPU")
    path = os.fsdecode(path)
    if not has_dali():
        if decoder == "dali":
            raise RuntimeError("open_video: decoder 'dali' needs NVIDIA DALI: pip install 'merv-fast[dali]'")
        return Choice("pyav", "NVIDIA DALI is not installed (pip install 'merv-fast[dali]')")
    obstacle = not_a_stream(path) or codec_obstacle(read_header(path, limits), wanted_on) or size_obstacle(path)
    seen = None if obstacle else survey(path, limits)
    if seen:
        obstacle = numbering_obstacle(path, limits, seen)
    if obstacle and decoder == "dali":
        raise VideoError(path, f"cannot be decoded by DALI: {obstacle}")
    if obstacle or seen is None:
        return Choice("pyav", obstacle)
    return Choice("dali", f"{engine(wanted_on)} decodes {seen.codec}", wanted_on, seen)


def check_device(device: torch.device | str | None) -> torch.device:
    """The device, with its index if it is a GPU; raise ValueError if it is not here."""
    device = CPU if device is None else torch.device(device)
    if device.type == "cpu":
        return CPU
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    index = (torch.cuda.current_device() if count else 0) if device.index is None else device.index
    if index >= count:
        raise ValueError(f"open_video: device must be cpu or one of the {count} GPUs that PyTorch sees, got {device}")
    return torch.device(device.type, index)


def has_dali() -> bool:
    """Whether NVIDIA DALI is installed."""
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def read_header(path: str, limits: VideoLimits) -> Header:
    """What ``path`` says of its pictures; VideoError if it is not a video."""
    check_samples(path, limits)
    with open_container(path, limits) as (container, stream):
        context = stream.codec_context
        pixel_format = context.pix_fmt
        return Header(
            codec=context.codec.canonical_name,
            profile=context.profile,
            pixel_format=pixel_format,
            coded_size=(stream.height, stream.width),
            matrix=int(context.colorspace),
            full_range=int(context.color_range) == 2 or (pixel_format or "").startswith("yuvj"),
            streams=len(container.streams.video),
        )


def not_a_stream(path: str) -> str:
    """Why there is no video stream in ``path``, or nothing."""
    if os.path.isdir(path):
        return "it is a folder of pictures"
    return "it is a picture" if Path(path).suffix.lower() in PICTURES else ""


def codec_obstacle(header: Header, device: torch.device) -> str:
    """Why DALI on ``device`` does not decode a file with that header, or nothing."""
    codec = header.codec
    if device.type == "cpu" and codec not in DALI_CPU_CODECS:
        return f"on the CPU it decodes {', '.join(DALI_CPU_CODECS)}, not {codec}"
    if device.type == "cuda" and (obstacle := nvdec_obstacle(header, device)):
        return obstacle
    if header.pixel_format not in ("yuv420p", "yuvj420p"):
        return f"it is trusted with 8-bit 4:2:0 only, not {header.pixel_format}"
    if header.matrix in CONVERTIBLE and header.matrix not in DALI_MATRICES:
        return f"it converts colours by BT.601, the file names matrix {header.matrix} of ITU-T H.273"
    return "" if header.streams == 1 else f"it might take another one of the {header.streams} streams of pictures"


def nvdec_obstacle(header: Header, device: torch.device) -> str:
    """Why the decoding engine of that GPU does not take a file with that header, or nothing."""
    codec, capability = header.codec, torch.cuda.get_device_capability(device)
    if codec not in NVDEC_CODECS.get(capability, ()):
        return f"{engine(device)} does not decode {codec}, as far as is known"
    profiles = PROFILES[codec]
    if profiles is not None and header.profile not in profiles:
        return f"NVDEC is trusted with {codec} {', '.join(profiles)} only, not {header.profile}"
    shortest, longest = MPEG4_SIDES if codec == "mpeg4" else NVDEC_SIDES
    if not shortest <= min(header.coded_size) <= max(header.coded_size) <= longest:
        height, width = header.coded_size
        return f"NVDEC is trusted with sides of {shortest} to {longest} pixels, not {width}x{height}"
    return "NVDEC is trusted with limited range only, not full" if header.full_range else ""


def engine(device: torch.device) -> str:
    """What of ``device`` decodes, for people."""
    if device.type == "cpu":
        return "DALI on the CPU"
    major, minor = torch.cuda.get_device_capability(device)
    return f"NVDEC of {device} (compute capability {major}.{minor})"


def size_obstacle(path: str) -> str:
    """Why the file is too large to be held in memory, or nothing."""
    size = os.path.getsize(path)
    return "" if size <= DALI_BYTES else f"it would hold all {size / 2**30:.1f} GiB of the file in memory"


def numbering_obstacle(path: str, limits: VideoLimits, seen: Survey) -> str:
    """Why DALI might give other frames than PyAV for the same indices, or nothing.

    DALI numbers packets by their presentation times: hidden and discarded pictures, packets before time zero and
    damaged files would shift its numbers, or leave frames unwritten.
    """
    if seen.damaged:
        return "the file is truncated or damaged"
    if seen.times is None:
        return "the file gives no presentation times that can be trusted"
    errors: list[Exception] = []
    with open_container(path, limits) as (container, stream):
        times = [packet.pts for packet in packets(container, stream, errors)]
    known = sorted(time for time in times if time is not None)
    if errors or len(known) < len(times) or known[0] < 0 or known != seen.times.tolist():
        return "not every packet of the file is a frame that is shown"
    return ""
