"""How many samples an MP4 file speaks of: a few bytes may state any number, and FFmpeg makes room for all of them."""

import os
import re
import struct

import numpy as np

from merv_fast.errors import VideoError
from merv_fast.video.base import VideoLimits
from merv_fast.video.progress import tick

__all__ = ["check_samples"]

SAMPLES_PER_FRAME = 8
"""Sound and subtitles have samples too."""

SAMPLE_BYTES = 100
"""Of tables, more than a sample takes (a size, a place and two times)."""

DESCRIPTION_BYTES = 2**24
"""Of names, pictures of covers, and the rest of a header."""

# Parts of a file in which FFmpeg looks for tables, however they are nested.
HEADERS = frozenset(b"moov moof udta meta mvex trak mdia minf stbl traf edts dinf clip tref".split())
TABLES = re.compile(rb"trak|hdlr|st(?:ts|sz|z2|sc|co)|co64|trun")

# Samples of PCM that FFmpeg takes as one.
PCM_SAMPLES = 1024


def check_samples(path: str, limits: VideoLimits) -> None:
    """Raise VideoError if ``path`` is an MP4 or QuickTime file that speaks of many more samples than frames allowed.

    Source: ISO/IEC 14496-12, 8.6 to 8.8; what FFmpeg makes of it is in its libavformat/mov.c.
    """
    most = SAMPLES_PER_FRAME * limits.max_frames
    samples, place, end = 0, 0, os.path.getsize(path)
    with open(path, "rb") as file:
        while place + 8 <= end:
            tick()
            file.seek(place)
            size, kind = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
            if size == 1:
                size = int.from_bytes(file.read(8))
            size = min(size, end - place) if size else end - place
            if kind in HEADERS:
                if size > SAMPLE_BYTES * most + DESCRIPTION_BYTES:
                    raise VideoError(path, f"has a header of {size} bytes, too many for {limits.max_frames} frames")
                samples += promised_samples(file.read(size))
            if samples > most:
                allowed = f"{SAMPLES_PER_FRAME} for each of {limits.max_frames} frames (VideoLimits.max_frames)"
                raise VideoError(path, f"promises {samples} samples, the limit is {allowed}")
            # In a file of another kind the numbers mean nothing, and soon lead to its end.
            place += max(size, 8)


def promised_samples(header: bytes) -> int:
    """The samples of which the tables in a part of a file speak."""
    samples = 0
    track = Track()
    # The last table may be cut short.
    header += bytes(16)
    table = TABLES.search(header)
    while table:
        tick()
        following = TABLES.search(header, table.end())
        if table[0] == b"trak":
            samples += track.samples
            track = Track()
        elif table[0] == b"trun":
            samples += number(header, table.end() + 4)
        else:
            end = following.start() if following else len(header)
            track.read(table[0], header[table.end() : max(table.end() + 16, end)])
        table = following
    return samples + track.samples


def number(data: bytes, place: int) -> int:
    """32 bits."""
    return int.from_bytes(data[place : place + 4])


class Track:
    """The tables of one track, by those that FFmpeg takes, the last of each kind."""

    def __init__(self) -> None:
        self._promised = self._chunks = self._most_in_chunk = 0
        self._sound = self._even = False

    def read(self, kind: bytes, fields: bytes) -> None:
        """Note a table with those ``fields``, which go on at least to its end."""
        if kind == b"hdlr" and fields[8:12] in (b"soun", b"vide"):
            self._sound = fields[8:12] == b"soun"
        elif kind in (b"stsz", b"stz2"):
            self._promised = number(fields, 8)
        elif kind == b"stts":
            self._even = number(fields, 4) == 1 == number(fields, 12)
        elif kind in (b"stco", b"co64"):
            self._chunks = number(fields, 4)
        elif kind == b"stsc":
            entries = min(number(fields, 4), (len(fields) - 8) // 12)
            self._most_in_chunk = int(np.frombuffer(fields, ">u4", 3 * entries, 8)[1::3].max(initial=0))

    @property
    def samples(self) -> int:
        """Those that FFmpeg makes room for: PCM it takes in pieces, of each chunk by itself."""
        if self._sound and self._even:
            return self._chunks * (self._most_in_chunk // PCM_SAMPLES + 1)
        return self._promised
