"""Decode only the parts of a video that hold the frames asked for: where to start, what to skip, how to be sure."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from merv_fast.video.container import decode, packets
from merv_fast.video.references import References
from merv_fast.video.units import (
    UNIT_CODECS,
    are_frames,
    in_record,
    layer_of,
    packet_of,
    parameter_sets,
    random_access,
    sets_among,
    slice_heads,
    units_of,
)

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

__all__ = ["Mismatch", "PacketIndex", "PacketLog", "Run", "decode_runs"]

RESTART = 8
"""What a new start costs, in decoded frames: to run the decoder dry, to flush it and to fill its threads again."""

STRETCH = 32
"""Packets that a run holds at least if it is made for another decoder."""

READ_THROUGH = 64
"""Packets that are read and dropped sooner than sought over."""

NO_TIME = np.iinfo(np.int64).min

# Codecs whose key frames leave nothing of what came before to the frames shown after them. H.264 and HEVC are
# looked into, since containers also flag frames there from which a picture only recovers gradually.
SELF_CONTAINED = frozenset({"mpeg1video", "mpeg2video", "mpeg4", "vp8", "vp9", "av1", "mjpeg", "prores", "ffv1"})

# Two packets may hold the two fields of one frame; H.264 is looked into.
FIELD_CODED = frozenset({"h264", "mpeg2video"})


class Mismatch(Exception):
    """What came out is not what the index announced; the file must be decoded from its start."""


@dataclass(frozen=True)
class Run:
    """A stretch of packets to decode: positions ``start`` to ``stop``, both included, for the ``wanted`` frames."""

    start: int
    stop: int
    wanted: frozenset[int]


@dataclass(frozen=True)
class PacketIndex:
    """The packets of a stream by their position in decoding order, and its frames in presentation order.

    Attributes:
        pts: [packets] presentation times; `NO_TIME` where a packet that is not shown has none.
        sizes: [packets] bytes.
        times: [frames] ascending presentation times.
        positions: [frames] of the packet of each.
        droppable: [packets] whether no other picture is decoded from this one.
        entries: ascending positions of packets from which every frame shown no earlier decodes exactly; their
            presentation times ascend too. The first packet is always one.
        fields: whether a frame may be in two packets, the second of which is not shown by itself.
        references: tells which other pictures a run does without, where that can be known.
    """

    pts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    times: NDArray[np.int64]
    positions: NDArray[np.int64]
    droppable: NDArray[np.bool_]
    entries: NDArray[np.int64]
    fields: bool = True
    references: References | None = None

    def runs(self, wanted: list[int], apart: bool = False) -> list[Run]:
        """The cheapest stretches to decode for the ascending ``wanted`` frames.

        One ends where going on would decode more than `RESTART` frames before the next frame's entry; with ``apart``,
        for several decoders, at every entry once it is `STRETCH` packets long.
        """
        times = self.pts[self.entries]
        # From the start of the file everything decodes, whatever the first packet's time.
        times[0] = NO_TIME
        runs: list[tuple[int, int, list[int]]] = [(0, -1, [])]
        for frame in wanted:
            start, stop, frames = runs[-1]
            position = int(self.positions[frame])
            entry = bisect_right(times, self.times[frame]) - 1
            while self.entries[entry] > position:
                entry -= 1
            begin = int(self.entries[entry])
            if begin - stop - 1 > RESTART or (apart and begin - start >= STRETCH):
                runs.append((begin, position, [frame]))
            else:
                runs[-1] = (start, max(stop, position), [*frames, frame])
        return [Run(start, stop, frozenset(frames)) for start, stop, frames in runs if frames]

    def cost(self, run: Run) -> int:
        """Frames that are decoded for a run, at most."""
        stretch = slice(run.start, run.stop + 1)
        return run.stop + 1 - run.start - int(np.count_nonzero(self.droppable[stretch]))

    def instead(self, run: Run) -> dict[int, list[bytes]]:
        """What to decode for those packets of a run that nothing wanted is decoded from: units, or none."""
        wanted = {int(self.positions[number]) for number in run.wanted} | {run.start}
        if self.fields:
            wanted |= {position + 1 for position in wanted}
        unused = {run.start + int(each) for each in np.flatnonzero(self.droppable[run.start : run.stop + 1])} - wanted
        instead: dict[int, list[bytes]] = {position: [] for position in unused}
        if self.references:
            rest = [position for position in range(run.start, run.stop + 1) if position not in unused]
            instead |= self.references.stand_ins(rest, wanted)
        return instead

    def frame_at(self, time: int | None) -> int:
        """The number of the frame shown at ``time``; raises `Mismatch` if there is none."""
        frame = int(np.searchsorted(self.times, time)) if time is not None else len(self.times)
        if frame == len(self.times) or self.times[frame] != time:
            raise Mismatch(f"no packet announced a frame at {time}")
        return frame


@dataclass
class PacketLog:
    """Collects packets in decoding order, all that the demuxer gives, and makes their `PacketIndex`."""

    codec: str
    extradata: bytes | None
    pts: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)
    discarded: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    referenced: list[bool] = field(default_factory=list)
    in_band: frozenset[int] = frozenset()
    sets: set[bytes] = field(default_factory=set)
    heads: list[tuple[bytes, ...]] = field(default_factory=list)
    reconfigured: bool = False

    def add(self, packet: "Packet[VideoStream]", shown: bool) -> None:
        """Note the next packet."""
        position = len(self.pts)
        time = NO_TIME if packet.pts is None else packet.pts
        self.pts.append(time)
        self.sizes.append(packet.size)
        if shown:
            self.shown.append(position)
        elif packet.is_discard:
            self.discarded.append(time)
        units = list(units_of(bytes(packet), self.codec, self.extradata)) if self.codec in UNIT_CODECS else []
        layer, referenced = layer_of(units, self.codec) if units else (0, True)
        self.layers.append(layer)
        if self.codec == "h264":
            self.sets.update(sets_among(units))
            self.heads.append(slice_heads(units))
        self.referenced.append(referenced)
        if not position:
            self.in_band = parameter_sets(units, self.codec) if units else frozenset()
        else:
            # A decoder that skips this packet would go on with its old parameters.
            self.reconfigured |= packet.has_sidedata("new_extradata")
        if not position or (shown and packet.is_keyframe and self._is_entry(units)):
            self.entries.append(position)

    def _is_entry(self, units: list[bytes]) -> bool:
        """Whether every frame shown with or after this one decodes without anything before it."""
        if self.codec in SELF_CONTAINED:
            return True
        # A stream that carries its parameter sets along must repeat them here.
        return (
            self.codec in UNIT_CODECS
            and self.in_band <= parameter_sets(units, self.codec)
            and random_access(units, self.codec)
        )

    def index(self) -> PacketIndex | None:
        """The index, or None if times, edits or changes of the format make it unsafe to skip anything."""
        pts = np.array(self.pts, np.int64)
        positions = np.array(self.shown, np.int64)
        entries = np.array(self.entries, np.int64)
        times = pts[positions]
        order = np.argsort(times, kind="stable")
        times, positions = times[order], positions[order]
        # Edit lists may cut off the two ends; one that cuts inside shifts times against the packets' order.
        inside = any(times[0] < time < times[-1] or time == NO_TIME for time in self.discarded)
        ascending = bool((np.diff(pts[entries[1:]]) > 0).all())
        if self.reconfigured or inside or not ascending or times[0] == NO_TIME or not np.diff(times).all():
            return None
        # A picture that its own temporal layer does without may still be of use to a higher one.
        droppable = ~np.array(self.referenced, np.bool_) & (np.array(self.layers) == max(self.layers))
        fields, references = self.codec in FIELD_CODED, None
        if self.codec == "h264":
            sets = [*in_record(self.extradata), *self.sets]
            fields, references = not are_frames(sets), References.of_stream(sets, self.heads)
        sizes = np.array(self.sizes, np.int64)
        return PacketIndex(pts, sizes, times, positions, droppable, entries, fields, references)


def decode_runs(
    container: "InputContainer", stream: "VideoStream", index: PacketIndex, runs: Iterable[Run]
) -> "Iterator[tuple[int, VideoFrame]]":
    """Each wanted frame of ``runs``, in any order, with its number; in presentation order within a run.

    Pictures that are not wanted and from which nothing wanted is decoded are left out. Every packet is compared with
    the index before it is decoded, and every frame is known by its time.

    Raises:
        Mismatch: A packet or frame is not the one announced, or does not decode. What was yielded before holds.
    """
    errors: list[Exception] = []
    reader = PacketReader(container, stream, index, errors)
    codec = stream.codec_context.codec.canonical_name
    if codec == "vp9":
        # With several frames at once, FFmpeg's decoder (8.1) crashes at a damaged packet that follows a flush.
        stream.thread_type = "SLICE"
    for run in runs:
        reader.go_to(run.start)
        left = set(run.wanted)
        first = run.start > 0
        for frame in reader.decode(run.stop + index.fields, index.instead(run)):
            if errors:
                raise Mismatch(f"decoding failed: {errors[0]}")
            number = index.frame_at(frame.pts)
            # Decoders keep frames back that lean on what came before the entry; one that does not is of no use here.
            if frame.is_corrupt or (first and not (frame.pts == index.pts[run.start] and frame.key_frame)):
                raise Mismatch(f"the frame at {frame.pts} is damaged or no entry")
            first = False
            if number in left:
                yield number, frame
                left.remove(number)
                if not left:
                    break
        if left:
            raise Mismatch(f"{len(left)} frames did not come")
        stream.codec_context.flush_buffers()


class PacketReader:
    """Reads the packets of a stream at known positions; each must be the one that the index has there."""

    def __init__(
        self, container: "InputContainer", stream: "VideoStream", index: PacketIndex, errors: list[Exception]
    ) -> None:
        self._container, self._stream, self._index, self._errors = container, stream, index, errors
        self._source = packets(container, stream, errors)
        self._next = 0
        self._held: Packet[VideoStream] | None = None

    def go_to(self, position: int) -> None:
        """Make the packet at ``position``, an entry, the next one."""
        if not 0 <= position - self._next <= READ_THROUGH:
            self._seek(position)
        while self._next < position:
            self._take()

    def decode(self, stop: int, instead: Mapping[int, list[bytes]]) -> "Iterator[VideoFrame]":
        """All that the packets up to ``stop``, or units ``instead``, bring out of the decoder, which is then done."""
        while self._next <= min(stop, len(self._index.pts) - 1):
            units, packet = instead.get(self._next), self._take()
            if units is None or units:
                yield from decode(self._stream, self._holding(units, packet) if units else packet, self._errors)
        yield from decode(self._stream, None, self._errors)

    def _holding(self, units: list[bytes], packet: "Packet[VideoStream]") -> "Packet[VideoStream]":
        """A packet with other units for the time of ``packet``."""
        from av import Packet

        context = self._stream.codec_context
        data = packet_of(units, context.codec.canonical_name, context.extradata)
        other = cast("Packet[VideoStream]", Packet(data))
        other.pts, other.dts, other.time_base = packet.pts, packet.dts, packet.time_base
        return other

    def _take(self) -> "Packet[VideoStream]":
        packet = self._held or next(self._source, None)
        self._held = None
        if packet is None or (time_of(packet), packet.size) != self._announced(self._next):
            raise Mismatch(f"packet {self._next} is not the one that was there before")
        self._next += 1
        return packet

    def _seek(self, position: int) -> None:
        """Let the container find ``position``; where it stops earlier, read on."""
        import av

        target = self._index.pts[position]
        place = int(np.searchsorted(self._index.entries, position))
        # A container that takes the presentation time for a decoding time overshoots where key frames are close.
        for entry in self._index.entries[[place, place - 1]]:
            try:
                self._container.seek(int(self._index.pts[entry]), stream=self._stream)
            except av.FFmpegError as error:
                raise Mismatch(f"seeking failed: {error}") from error
            self._source = packets(self._container, self._stream, self._errors)
            for packet in self._source:
                if time_of(packet) == target:
                    self._held, self._next = packet, position
                    return
                if packet.is_keyframe and time_of(packet) > target:
                    break
        raise Mismatch(f"no seek leads to packet {position}")

    def _announced(self, position: int) -> tuple[int, int]:
        return int(self._index.pts[position]), int(self._index.sizes[position])


def time_of(packet: "Packet[VideoStream]") -> int:
    """Presentation time, or `NO_TIME`."""
    return int(NO_TIME) if packet.pts is None else packet.pts
