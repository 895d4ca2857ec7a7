"""How many decoders work on one video side by side."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from merv_fast.video.seeking import PacketIndex, Run

__all__ = ["Lanes", "choose_lanes", "drain"]

MOST_LANES = 4
MOST_PIXELS = 2**26
"""Of one frame times lanes: each decoder holds some twenty frames."""

OPENING = 8
"""What another decoder costs, in decoded frames: to open the file once more."""


@dataclass(frozen=True)
class Lanes:
    """``count`` decoders of ``threads`` threads each that take ``runs`` in turns, the longest first."""

    count: int
    threads: int
    runs: list[Run]

    def skips(self, index: PacketIndex) -> bool:
        """Whether this is less work than to decode everything from the start of the file."""
        run = self.runs[0]
        return len(self.runs) > 1 or run.start > 0 or index.cost(run) <= run.stop


def choose_lanes(index: PacketIndex, wanted: list[int], threads: int, coded_size: tuple[int, int]) -> Lanes:
    """The quickest way to decode the ascending ``wanted`` frames with so many threads.

    A decoder's threads wait for each other: two make it 1.4 times as fast as one, measured on H.264, and n are taken to
    make it n ** 0.5 times as fast. Decoders do not wait for each other, but need runs that start with an entry, and
    `OPENING` to begin.
    """
    together = index.runs(wanted)
    best, least = Lanes(1, threads, together), sum(map(index.cost, together)) / threads**0.5
    apart = index.runs(wanted, apart=True)
    costs = [index.cost(run) for run in apart]
    height, width = coded_size
    for count in range(2, min(threads, len(apart), MOST_LANES, MOST_PIXELS // (height * width)) + 1):
        time = OPENING + max(max(costs), sum(costs) / count) / (threads // count) ** 0.5
        if time < least:
            # The longest first, so that no decoder is left with one at the end.
            longest = [run for _, run in sorted(zip(costs, apart, strict=True), key=lambda each: -each[0])]
            best, least = Lanes(count, threads // count, longest), time
    return best


def drain(runs: deque[Run]) -> Iterator[Run]:
    """Take from the left until nothing is left, also with others who do so."""
    while True:
        try:
            run = runs.popleft()
        except IndexError:
            return
        yield run
