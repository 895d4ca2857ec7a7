"""Videos and GIFs through PyAV, whose wheel carries FFmpeg."""

import logging
import os
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from merv_fast.errors import VideoError
from merv_fast.video.base import Put, Video, VideoLimits
from merv_fast.video.container import decode_all, open_container
from merv_fast.video.lanes import Lanes, choose_lanes, drain
from merv_fast.video.picture import blacken_transparent, to_rgb
from merv_fast.video.progress import time_limit
from merv_fast.video.seeking import Mismatch, PacketIndex, decode_runs
from merv_fast.video.survey import survey

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

__all__ = ["PyAVVideo"]

logger = logging.getLogger("merv_fast")


class PyAVVideo(Video):
    """A video file, decoded from its start up to the last frame asked for, or only around the frames asked for.

    Which of the two, and whether several decoders work side by side, is decided by the frames to decode, from the
    packets' index (`merv_fast.video.seeking`, `merv_fast.video.lanes`); frames are the same either way.

    The container's own frame count is not believed: `merv_fast.video.survey` counts. A frame that
    nevertheless turns out not to decode is replaced by the nearest one before it (at the start, after it). In
    both cases a warning says how many frames are missing; under ``strict`` it is a VideoError. A stream that
    changes its size midway is scaled to the size of its first frame.
    """

    def __init__(self, path: str, limits: VideoLimits, strict: bool) -> None:
        self.path = path
        self._limits = limits
        self._strict = strict
        self._survey = survey(path, limits)
        self.fps, self.duration = self._survey.fps, self._survey.duration
        self.size = self._survey.orientation.size(*self._survey.coded_size)
        self._index = self._survey.index
        # With several threads PyAV loses the frames in flight when one of them fails.
        self._threads = 1 if self._survey.damaged else decoding_threads()
        self.decoder = f"PyAV ({self._survey.codec}, {self._threads} thread{'s' * (self._threads > 1)})"
        self._report(self._survey.promised - self._survey.frames, self._survey.promised)

    def __len__(self) -> int:
        return self._survey.frames

    def _report(self, missing: int, total: int) -> None:
        if missing and self._strict:
            raise VideoError(self.path, f"is truncated or damaged: {missing} of {total} frames are missing")
        if missing:
            logger.warning("%s: truncated or damaged, %d of %d frames are missing", self.path, missing, total)

    def _read(self, wanted: list[int], put: Put) -> None:
        with time_limit(self.path, self._limits.max_decode_seconds):
            index = self._index
            lanes = choose_lanes(index, wanted, self._threads, self._survey.coded_size) if index else None
            if index and lanes and lanes.skips(index):
                try:
                    return self._decode_parts(index, lanes, put)
                except Mismatch as mismatch:
                    logger.warning("%s: decoding from its start, for %s", self.path, mismatch)
                    self._index = None
            convert = self._converter()
            missing = 0
            for number, frame, exact in self._decode_all(wanted):
                missing += not exact
                put(number, convert(frame))
            self._report(missing, len(wanted))

    def _decode_parts(self, index: PacketIndex, lanes: Lanes, put: Put) -> None:
        """Decode the runs of ``lanes``; raise Mismatch if the index does not hold."""
        stretches = deque(lanes.runs)

        def decode_some() -> None:
            convert = self._converter()
            try:
                with self._open(lanes.threads) as (container, stream):
                    for number, frame in decode_runs(container, stream, index, drain(stretches)):
                        put(number, convert(frame))
            finally:
                # At the end they are used up; after an error the others need not go on.
                stretches.clear()

        if lanes.count == 1:
            return decode_some()
        with ThreadPoolExecutor(lanes.count, "merv_fast decoder") as pool:
            try:
                for future in [pool.submit(copy_context().run, decode_some) for _ in range(lanes.count)]:
                    future.result()
            finally:
                stretches.clear()

    def _decode_all(self, wanted: list[int]) -> "Iterator[tuple[int, VideoFrame, bool]]":
        """Each wanted index with its frame and whether it is that one; it may come again with a better frame."""
        if self._threads > 1:
            errors: list[Exception] = []
            for index, frame, exact in self._decode(wanted, self._threads, errors):
                # Without presentation times a lost frame would shift all that follow.
                if not exact or (errors and self._survey.times is None):
                    break
                yield index, frame, exact
            else:
                return
        yield from self._decode(wanted, 1, [])

    def _decode(
        self, wanted: list[int], threads: int, errors: list[Exception]
    ) -> "Iterator[tuple[int, VideoFrame, bool]]":
        """Each wanted index with its frame and True, or with the nearest frame and False."""
        with self._open(threads) as (container, stream):
            place, current, previous = 0, -1, None
            for frame in decode_all(container, stream, errors):
                current = self._number(frame, current + 1)
                while wanted[place] <= current:
                    exact = wanted[place] == current
                    yield wanted[place], frame if exact else previous or frame, exact
                    place += 1
                    if place == len(wanted):
                        return
                previous = frame
            if previous is None:
                raise VideoError(self.path, "holds no frame that can be decoded")
            for index in wanted[place:]:
                yield index, previous, False

    def _converter(self) -> "Callable[[VideoFrame], NDArray[np.uint8]]":
        """From frames, one after another, to upright RGB pixels."""
        from av.video.reformatter import VideoReformatter

        reformatter = VideoReformatter()

        def convert(frame: "VideoFrame") -> NDArray[np.uint8]:
            pixels = to_rgb(frame, reformatter, self._survey.coded_size)
            if self._survey.codec == "gif":
                pixels = blacken_transparent(frame, pixels)
            return self._survey.orientation.apply(pixels)

        return convert

    @contextmanager
    def _open(self, threads: int) -> "Iterator[tuple[InputContainer, VideoStream]]":
        with open_container(self.path, self._limits) as (container, stream):
            stream.thread_type = "AUTO" if threads > 1 else "NONE"
            stream.thread_count = threads
            yield container, stream

    def _number(self, frame: "VideoFrame", following: int) -> int:
        """The number of a frame by its presentation time, else the following one."""
        times = self._survey.times
        if times is None or frame.pts is None:
            return following
        index = bisect_left(times, frame.pts)
        return index if index < len(times) and times[index] == frame.pts else following


_processes = 1


def share_processors(processes: int) -> None:
    """Leave room for as many processes like this one."""
    global _processes
    _processes = processes


def decoding_threads() -> int:
    """One for each processor this process may run on, less the share of others, at most 16 (FFmpeg's own bound)."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(usable // _processes, 1), 16)
