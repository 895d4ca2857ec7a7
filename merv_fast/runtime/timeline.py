"""The ranges of a Chrome trace: what each took, and a picture with a lane for each thread and each stream of a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, floor, log10
from typing import Any

from torch import Tensor

from merv_fast.spans import PREFIX
from merv_fast.video.drawing import BACKGROUND, BRIGHT, DIM, LETTER, Colour, box, canvas, write

__all__ = ["Lane", "Range", "Total", "draw_timeline", "read_lanes", "totals"]

WORK = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of what a GPU does."""

WIDTH = 1680
MARGIN = 24
# Heights in pixels.
LINE = 22
ROW = 28
WORK_ROW = 12
GRID = (44, 48, 56)
WORK_COLOUR = (104, 112, 126)
PALETTE: tuple[Colour, ...] = (
    (110, 168, 254),
    (94, 201, 157),
    (250, 189, 96),
    (240, 128, 128),
    (186, 150, 240),
    (104, 206, 220),
    (222, 214, 110),
    (238, 150, 200),
    (160, 196, 120),
    (216, 166, 132),
    (140, 160, 240),
    (226, 110, 164),
    (120, 220, 220),
    (200, 170, 90),
)
ROOT, WHOLE = f"{PREFIX}answer", (170, 176, 188)
"""The range of everything, and its colour."""


@dataclass(frozen=True)
class Range:
    """One range: its name, its start and end in nanoseconds, and how many ranges of its lane it lies in."""

    name: str
    start: int
    end: int
    depth: int


@dataclass(frozen=True)
class Lane:
    """A thread, or a stream of a GPU with ``work``: the start and end of each kernel and copy."""

    name: str
    on_gpu: bool
    ranges: list[Range]
    work: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Total:
    """What the ranges of one name took together.

    Args:
        name: of the ranges.
        count: how many there are.
        ms: milliseconds of the threads.
        share: of the longest range.
        gpu_ms: from the first to the last kernel of each, added up; None without a GPU.
    """

    name: str
    count: int
    ms: float
    share: float
    gpu_ms: float | None


def read_lanes(trace: Mapping[str, Any]) -> list[Lane]:
    """The lanes of a Chrome trace of ``torch.profiler`` that hold `span` ranges or work of a GPU; threads first.

    >>> event = {"ph": "X", "cat": "user_annotation", "name": "merv/fuse", "pid": 1, "tid": 2, "ts": 5.0, "dur": 1.5}
    >>> read_lanes({"traceEvents": [event]})[0].ranges
    [Range(name='merv/fuse', start=5000, end=6500, depth=0)]
    """
    names: dict[tuple[Any, Any], str] = {}
    ranges: dict[tuple[Any, Any], list[tuple[int, int, str]]] = {}
    work: dict[tuple[Any, Any], list[tuple[int, int]]] = {}
    gpu = set()
    for event in trace["traceEvents"]:
        place = event.get("pid"), event.get("tid")
        if event["ph"] == "M" and event["name"] == "thread_name":
            names[place] = event["args"]["name"].strip()
        if event["ph"] != "X":
            continue
        category, start = event.get("cat", ""), round(event["ts"] * 1000)
        end = start + round(event["dur"] * 1000)
        if category in WORK or category == "gpu_user_annotation":
            gpu.add(place)
        if category in WORK:
            work.setdefault(place, []).append((start, end))
        elif category.endswith("user_annotation") and event["name"].startswith(PREFIX):
            ranges.setdefault(place, []).append((start, end, event["name"]))
    places = sorted(
        ranges.keys() | work.keys(), key=lambda place: (place in gpu, *(str(part).rjust(20) for part in place))
    )
    return [
        Lane(
            f"GPU {place[0]}, {names.get(place, place[1])}" if place in gpu else names.get(place, f"thread {place[1]}"),
            place in gpu,
            nested(ranges.get(place, [])),
            sorted(work.get(place, [])),
        )
        for place in places
    ]


def nested(ranges: Sequence[tuple[int, int, str]]) -> list[Range]:
    """Ranges of one lane, in the order of their starts, with their depths."""
    found: list[Range] = []
    ends: list[int] = []
    for start, end, name in sorted(ranges, key=lambda each: (each[0], -each[1])):
        while ends and ends[-1] <= start:
            ends.pop()
        found.append(Range(name, start, end, len(ends)))
        ends.append(end)
    return found


def totals(lanes: Sequence[Lane]) -> list[Total]:
    """One line for each name, in the order in which they first occur on a thread."""
    every = sorted((each for lane in lanes if not lane.on_gpu for each in lane.ranges), key=lambda r: (r.start, -r.end))
    on_gpu = [each for lane in lanes if lane.on_gpu for each in lane.ranges]
    whole = max((each.end - each.start for each in every), default=0) or 1
    lines = []
    for name in dict.fromkeys(each.name for each in every):
        took = [each.end - each.start for each in every if each.name == name]
        gpu = sum(each.end - each.start for each in on_gpu if each.name == name) / 1e6 if on_gpu else None
        lines.append(Total(name, len(took), sum(took) / 1e6, sum(took) / whole, gpu))
    return lines


def draw_timeline(title: str, lanes: Sequence[Lane]) -> Tensor:
    """Draw the lanes over a time axis in milliseconds, nested ranges below those they lie in, and a table of them.

    A bar holds its name and duration if there is room; the table names each colour and holds what every name took. Of
    a GPU's stream the last row is its kernels and copies.

    Args:
        title: above the picture.
        lanes: at least one with a range or work.

    Returns:
        uint8 [H, 1680, 3].
    """
    moments = [(each.start, each.end) for lane in lanes for each in lane.ranges] + [w for l in lanes for w in l.work]
    origin, last = min(start for start, _ in moments), max(end for _, end in moments)
    scale = (WIDTH - 2 * MARGIN) / max(last - origin, 1)
    lines = totals(lanes)
    colours = colours_of([each.name for lane in lanes for each in lane.ranges])
    legend_rows = ceil(len(lines) / 2)
    height = 2 * MARGIN + 3 * LINE + sum(map(lane_height, lanes)) + (legend_rows + 2) * LINE
    sheet = canvas(height, WIDTH)
    write(sheet, title, MARGIN, MARGIN, BRIGHT, 2)
    top = MARGIN + 3 * LINE
    bottom = top + sum(map(lane_height, lanes))
    draw_axis(sheet, (last - origin) / 1e6, top, bottom)
    for lane in lanes:
        write(sheet, lane.name, top + 4, MARGIN, DIM, 2)
        top += LINE
        for each in lane.ranges:
            left, right = (MARGIN + round((moment - origin) * scale) for moment in (each.start, each.end))
            draw_bar(sheet, each, top + each.depth * ROW, left, max(right - left, 1), colours[each.name])
        top += rows_of(lane) * ROW
        for start, end in lane.work:
            left, right = (MARGIN + round((moment - origin) * scale) for moment in (start, end))
            box(sheet, top, left, WORK_ROW - 2, max(right - left, 1), WORK_COLOUR)
        top += WORK_ROW * bool(lane.work) + LINE // 2
    draw_table(sheet, lines, legend_rows, bottom + LINE, colours)
    return sheet


def rows_of(lane: Lane) -> int:
    """Rows of nested ranges."""
    return 1 + max((each.depth for each in lane.ranges), default=-1)


def lane_height(lane: Lane) -> int:
    """Pixels from the name of a lane to that of the next."""
    return LINE + rows_of(lane) * ROW + WORK_ROW * bool(lane.work) + LINE // 2


def colours_of(names: Sequence[str]) -> dict[str, Colour]:
    """A colour for each name; a block group has that of its encoder, lighter or darker in turns."""
    colours: dict[str, Colour] = {ROOT: WHOLE}
    families: dict[str, int] = {}
    for name in sorted(dict.fromkeys(name for name in names if name != ROOT), key=lambda name: name.count("/")):
        family, _, group = name.partition("/blocks ")
        colour = PALETTE[families.setdefault(family, len(families)) % len(PALETTE)]
        if group:
            shade = 0.82 if sum(other.startswith(f"{family}/blocks ") for other in colours) % 2 else 0.66
            colour = (int(colour[0] * shade), int(colour[1] * shade), int(colour[2] * shade))
        colours[name] = colour
    return colours


def draw_axis(sheet: Tensor, span_ms: float, top: int, bottom: int) -> None:
    """Vertical lines through the lanes, at round times, each with its milliseconds above."""
    step = round_step(span_ms / 12)
    for tick in range(floor(span_ms / step) + 1):
        left = MARGIN + round(tick * step / span_ms * (WIDTH - 2 * MARGIN))
        box(sheet, top, left, bottom - top, 1, GRID)
        label = f"{tick * step:g} ms"
        if left + 2 * LETTER * len(label) <= WIDTH:
            write(sheet, label, top - LINE + 2, left, DIM, 2)


def round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below ``least``.

    >>> [round_step(least) for least in (0.03, 1.1, 4, 60)]
    [0.05, 2.0, 5.0, 100.0]
    """
    power = 10.0 ** floor(log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def draw_bar(sheet: Tensor, each: Range, top: int, left: int, width: int, colour: Colour) -> None:
    """A bar with the last part of its name and its duration, or the name alone, or nothing, as there is room."""
    # A pixel of background on the right keeps neighbours apart.
    box(sheet, top, left, ROW - 3, width - (width > 3), colour)
    name = each.name.rpartition("/")[2]
    for text in (f"{name} {milliseconds((each.end - each.start) / 1e6)}", name):
        for dot in (2, 1):
            if len(text) * LETTER * dot + 6 <= width:
                write(sheet, text, top + (ROW - 3 - 7 * dot) // 2, left + 4, BACKGROUND, dot)
                return


def draw_table(sheet: Tensor, lines: Sequence[Total], rows: int, top: int, colours: Mapping[str, Colour]) -> None:
    """Two columns of ``rows`` lines: colour, name, count, milliseconds, share."""
    column = (WIDTH - 2 * MARGIN) // 2
    for index, line in enumerate(lines):
        left, line_top = MARGIN + index // rows * column, top + (index % rows + 1) * LINE
        box(sheet, line_top, left, 14, 14, colours[line.name])
        # A letter is 12 pixels wide, so a line is 66 letters.
        name = f"{line.name[:35]:36}"
        text = f"{line.count:4} x {milliseconds(line.ms):>12} {line.share:7.1%}"
        write(sheet, text, line_top, write(sheet, name, line_top, left + 24, BRIGHT, 2), DIM, 2)


def milliseconds(ms: float) -> str:
    """Three digits or more.

    >>> milliseconds(0.01234), milliseconds(3.14159), milliseconds(1234.5)
    ('0.012 ms', '3.14 ms', '1234 ms')
    """
    return f"{ms:.{3 if ms < 1 else 2 if ms < 10 else 1 if ms < 100 else 0}f} ms"
