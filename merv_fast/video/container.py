"""Open a local video file through FFmpeg and nothing that it may point to."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from merv_fast.errors import VideoError
from merv_fast.video.base import VideoLimits
from merv_fast.video.progress import tick

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

__all__ = ["decode", "decode_all", "open_container", "over_limit", "packets", "pixel_guard"]

# Demuxers whose files hold their own frames. Playlists (hls, dash, concat, sdp, imf) and image sequences,
# which open further files, are not among them; the audio ones are here so that the error can say "audio".
FORMATS = (
    "mov,matroska,avi,gif,mpegts,mpeg,mpegvideo,flv,asf,ogg,rm,mxf,nut,ivf,h264,hevc,m4v,obu,yuv4mpegpipe,"
    "mp3,wav,flac,aac"
)

# What the start of a refused file may give away; only the words of the error hang on it.
PLAYLISTS = (
    (rb"\s*#EXTM3U", "an HLS playlist"),
    (rb"\s*ffconcat", "a concat script"),
    (rb"\s*file\s+\S", "a concat script"),
    (rb"v=0\s", "an SDP description"),
    (rb"(?s).*<MPD", "a DASH manifest"),
)

KEPT_ERRORS = 100
"""Of one file, which may have as many as packets."""


@contextmanager
def open_container(path: str, limits: VideoLimits) -> "Iterator[tuple[InputContainer, VideoStream]]":
    """The demuxer of ``path`` and its video stream, checked against ``limits.max_pixels``."""
    import av
    from av.stream import Discard

    # FFmpeg passes these on to every file that it would open: others are refused below the demuxer.
    guard = {"max_pixels": str(pixel_guard(limits))}
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file", **guard}
    try:
        # The prefix keeps a file named "concat:a" from being read as a protocol.
        container = av.open(
            f"file:{path}", options=options, metadata_errors="replace", timeout=limits.max_decode_seconds
        )
    except av.FFmpegError as error:
        raise VideoError(path, refusal(path, error)) from error
    with container:
        stream = video_stream(path, container)
        if stream.width * stream.height > limits.max_pixels:
            raise VideoError(path, over_limit(limits, stream.width, stream.height))
        stream.codec_context.options = guard
        for other in container.streams:
            if other is not stream:
                other.discard = Discard.all
        yield container, stream


def pixel_guard(limits: VideoLimits) -> int:
    """The ``max_pixels`` at which FFmpeg itself allocates nothing more.

    It counts padded frames, so this leaves room; the limit itself is checked on the size that comes back.
    """
    return 2 * limits.max_pixels + (1 << 16)


def refusal(path: str, error: Exception) -> str:
    """Why a file did not open."""
    with open(path, "rb") as file:
        head = file.read(4096)
    for pattern, name in PLAYLISTS:
        if re.match(pattern, head):
            return f"is {name}, which points to other files or to a network; only a file's own frames are read"
    return f"is not a video that can be read here (FFmpeg: {getattr(error, 'strerror', None) or error})"


def over_limit(limits: VideoLimits, width: int = 0, height: int = 0) -> str:
    """The reason for too large a frame, whose size FFmpeg may have kept to itself."""
    size = f"of {width} x {height} pixels " if width else ""
    return f"a frame {size}exceeds the limit of {limits.max_pixels} pixels (VideoLimits.max_pixels)"


def video_stream(path: str, container: "InputContainer") -> "VideoStream":
    """The first stream of moving pictures; cover art does not count."""
    from av.stream import Disposition

    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        audio = bool(container.streams.audio)
        raise VideoError(path, "holds audio only, no video" if audio else "holds no video stream")
    if streams[0].codec_context is None:
        raise VideoError(path, "is compressed by a codec that FFmpeg has no decoder for")
    return streams[0]


def packets(
    container: "InputContainer", stream: "VideoStream", errors: list[Exception]
) -> "Iterator[Packet[VideoStream]]":
    """The stream's packets that hold data; an error of the demuxer ends them and is put into ``errors``.

    Each one is a `tick`.
    """
    import av

    try:
        for packet in container.demux(stream):
            # An empty packet would tell the decoder that the stream is over.
            if packet.size:
                tick()
                yield packet
    except av.FFmpegError as error:
        # Also where it was the time that ended them.
        tick()
        note(error, errors)
    except IndexError:
        # At the end, PyAV 18 stumbles over streams that showed up after the file was opened.
        pass


def decode(stream: "VideoStream", packet: "Packet[VideoStream] | None", errors: list[Exception]) -> "list[VideoFrame]":
    """The frames that a packet, or None for the end of the stream, brings out of the decoder."""
    import av

    try:
        return stream.decode(packet)
    except av.FFmpegError as error:
        note(error, errors)
        return []


def note(error: Exception, errors: list[Exception]) -> None:
    """Keep one of the first errors, without its traceback, from which the packet that did not decode hangs."""
    if len(errors) < KEPT_ERRORS:
        errors.append(error.with_traceback(None))


def decode_all(container: "InputContainer", stream: "VideoStream", errors: list[Exception]) -> "Iterator[VideoFrame]":
    """Every frame that decodes, in presentation order; errors are put into ``errors`` and stepped over."""
    for packet in packets(container, stream, errors):
        yield from decode(stream, packet, errors)
    yield from decode(stream, None, errors)
