"""Find out which frames a video file truly holds: read its packets, decode only the first frame."""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from merv_fast.errors import VideoError
from merv_fast.video.base import VideoLimits
from merv_fast.video.boxes import check_samples
from merv_fast.video.container import decode, decode_all, open_container, over_limit, packets
from merv_fast.video.orientation import Orientation
from merv_fast.video.progress import time_limit
from merv_fast.video.seeking import PacketIndex, PacketLog

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

__all__ = ["Survey", "survey"]


@dataclass(frozen=True)
class Survey:
    """What is known of a video stream.

    Attributes:
        codec: Name of the decoder.
        frames: Frames that decode.
        promised: Frames that the container speaks of, as far as it does; at least ``frames``.
        damaged: Whether decoding meets errors, or fewer frames than promised.
        times: Ascending presentation times of the frames, or None where they cannot be trusted and frames are
            numbered as they leave the decoder, which is in presentation order too.
        index: Where decoding may start, or None where it must start with the file.
        fps: Average rate.
        duration: Seconds: ``frames / fps``, or up to the last presentation time if that is later still.
        coded_size: (height, width) of the first frame as stored.
        orientation: How to turn it.
    """

    codec: str
    frames: int
    promised: int
    damaged: bool
    times: NDArray[np.int64] | None
    index: PacketIndex | None
    fps: float
    duration: float
    coded_size: tuple[int, int]
    orientation: Orientation


def survey(path: str, limits: VideoLimits) -> Survey:
    """Count and order the frames of ``path``.

    A packet counts as a frame. If anything speaks against that (an error, a packet cut short, a container that
    promises more, frames before the first keyframe), the file is decoded once to see what comes out.
    """
    with time_limit(path, limits.max_decode_seconds):
        found = look_through(path, limits)
    if found.duration > limits.max_duration:
        limit = f"{limits.max_duration:g} s (VideoLimits.max_duration)"
        raise VideoError(path, f"lasts {found.duration:.1f} s, the limit is {limit}")
    return found


def look_through(path: str, limits: VideoLimits) -> Survey:
    """The survey, whatever it takes."""
    errors: list[Exception] = []
    times: list[int | None] = []
    first = None
    hidden, discarded, doubtful = 0, 0, False
    check_samples(path, limits)
    with open_container(path, limits) as (container, stream):
        # One thread returns the first frame without delay.
        stream.thread_type = "NONE"
        codec = stream.codec_context.name
        log = PacketLog(stream.codec_context.codec.canonical_name, stream.codec_context.extradata)
        for packet in packets(container, stream, errors):
            if first is None:
                first = next(iter(decode(stream, packet, errors)), None)
            doubtful |= packet.is_corrupt or not (log.pts or packet.is_keyframe)
            shown = is_shown(packet, codec)
            log.add(packet, shown)
            if shown:
                times.append(packet.pts)
            else:
                hidden += 1
                discarded += packet.is_discard
            if max(len(times), hidden) > limits.max_frames:
                raise VideoError(path, too_many(limits))
        first = first or next(iter(decode(stream, None, errors)), None)
        if first is None or not times:
            raise VideoError(path, nothing_decodes(stream, errors, limits))
        # FFmpeg's guard leaves room, and a container may have stated another size.
        if first.width * first.height > limits.max_pixels:
            raise VideoError(path, over_limit(limits, first.width, first.height))
        known = [time for time in times if time is not None]
        # Where a container stores no presentation times (AVI), FFmpeg fills in decoding times.
        guessed = bool(stream.codec_context.has_b_frames) and known == sorted(known)
        trusted = len(set(known)) == len(times) and not guessed
        fps = average_rate(stream, known)
        span = float((max(known) - min(known)) * stream.time_base) if known and stream.time_base else 0.0
        frames = len(times)
        indexed = promised_by_index(container, stream, hidden, discarded, frames)
        promised = max(frames, indexed, promised_by_duration(stream, known, fps))
    doubtful |= bool(errors) or promised > frames or (trusted and min(known) < log.pts[0])
    if doubtful:
        known, frames = decodable(path, limits)
        trusted &= len(set(known)) == frames
    return Survey(
        codec=codec,
        frames=frames,
        promised=max(promised, frames),
        damaged=doubtful and (bool(errors) or promised > frames),
        times=np.array(sorted(known), np.int64) if trusted else None,
        index=log.index() if trusted and not doubtful else None,
        fps=fps,
        duration=max(frames / fps, span if span > (frames + 1) / fps else 0.0),
        coded_size=(first.height, first.width),
        orientation=Orientation.of_frame(first),
    )


def is_shown(packet: "Packet[VideoStream]", codec: str) -> bool:
    """Whether a packet becomes a frame that viewers see."""
    # VP8 keeps reference pictures that are never shown in packets of their own; bit 4 of the header tells.
    return not packet.is_discard and (codec != "vp8" or bool(memoryview(packet)[0] & 0x10))


def too_many(limits: VideoLimits) -> str:
    """The reason for too long a video."""
    return f"holds more than {limits.max_frames} frames (VideoLimits.max_frames)"


def nothing_decodes(stream: "VideoStream", errors: list[Exception], limits: VideoLimits) -> str:
    """Why the first frame did not come."""
    from av.error import ArgumentError

    # FFmpeg refuses a size above max_pixels as a wrong argument, and then forgets the size.
    if not stream.width and any(isinstance(error, ArgumentError) for error in errors):
        return over_limit(limits)
    # Some decoders give no reason; a size that they know and accept would still be there.
    bound = "" if stream.width else f" within the limit of {limits.max_pixels} pixels (VideoLimits.max_pixels)"
    return f"holds no frame that can be decoded{bound}"


def decodable(path: str, limits: VideoLimits) -> tuple[list[int], int]:
    """Presentation times (where a frame has one) and number of the frames that decode."""
    times, frames = [], 0
    with open_container(path, limits) as (container, stream):
        # With several threads PyAV loses the frames in flight when one of them fails.
        stream.thread_type = "NONE"
        for frame in decode_all(container, stream, []):
            frames += 1
            # A packet may bring more than one.
            if frames > limits.max_frames:
                raise VideoError(path, too_many(limits))
            if frame.pts is not None:
                times.append(frame.pts)
    return times, frames


def average_rate(stream: "VideoStream", times: list[int]) -> float:
    """The container's average rate, else the rate of the given times, else FFmpeg's guess."""
    if stream.average_rate:
        return float(stream.average_rate)
    span = max(times) - min(times) if times else 0
    if span and stream.time_base:
        return float((len(times) - 1) / (span * stream.time_base))
    return float(stream.guessed_rate or 25)


def promised_by_index(
    container: "InputContainer", stream: "VideoStream", hidden: int, discarded: int, frames: int
) -> int:
    """Frames that the container counts; ``hidden`` packets are not shown, ``discarded`` ones by an edit list."""
    if discarded and stream.frames - hidden > frames and "mp4" in container.format.name:
        # The count includes what the edit list cuts off; the demuxer's index does not.
        return sum(not entry.is_discard for entry in stream.index_entries) - (hidden - discarded)
    return stream.frames - hidden


def promised_by_duration(stream: "VideoStream", times: list[int], fps: float) -> int:
    """Frames that a Matroska track's stated duration makes one expect, or 0.

    Time missing at the end counts only where it is longer than any gap between two frames.
    """
    stated = re.fullmatch(r"(\d{1,9}):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if not stated or not times or stream.time_base is None:
        return 0
    hours, minutes, seconds = map(float, stated.groups())
    ordered = sorted(times)
    frame = 1 / fps
    gap = max((later - earlier for earlier, later in pairwise(ordered)), default=0) * float(stream.time_base)
    lacking = hours * 3600 + minutes * 60 + seconds - ordered[-1] * float(stream.time_base) - frame
    return len(times) + round(lacking * fps) if lacking > max(gap, frame) else 0
