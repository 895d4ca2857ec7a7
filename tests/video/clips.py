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


def panned(count: int, height: int = 64, width: int = 128, pix_fmt: str = "yuv420p") -> list[av.VideoFrame]:
    """A textured picture that moves, so that every predicted frame leans on others, with some cuts."""
    frames = []
    for place in range(count):
        scene, step = divmod(place, 40)
        coarse = np.random.default_rng(scene).integers(0, 256, (height // 4 + 40, width // 4 + 40, 3), np.uint8)
        texture = coarse.repeat(4, 0).repeat(4, 1)[2 * step :, 3 * step :][:height, :width]
        frames.append(av.VideoFrame.from_ndarray(np.ascontiguousarray(texture), "rgb24").reformat(format=pix_fmt))
    return frames


def plain_decode(path: Path) -> np.ndarray:
    """Every frame in RGB, as FFmpeg gives them from the first to the last."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def repeat_clip(source: Path, path: Path, times: int) -> Path:
    """The frames of ``source``, a clip that starts with a key frame that leans on nothing, over and over."""
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        packets = [packet for packet in reader.demux(video=0) if packet.size]
        step = max(packet.pts for packet in packets) + packets[0].duration
        for place in range(times):
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.stream, copy.time_base, copy.duration = stream, packet.time_base, packet.duration
                copy.pts, copy.dts = packet.pts + place * step, packet.dts + place * step
                copy.is_keyframe = packet.is_keyframe
                writer.mux(copy)
    return path
