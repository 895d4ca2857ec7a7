"""Results in long form, one row a measurement: what ``bench/results/*.csv`` holds."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

__all__ = ["COLUMNS", "Row", "append", "read", "read_latest", "split_name", "tabulate"]


@dataclass(frozen=True)
class Row:
    """One measurement of a result that was verified.

    Args:
        op: what was done.
        case: its shapes and variant.
        impl: which way of doing it.
        device: GPU or processor, and its threads.
        dtype: of the tensors.
        p20, p50, p80: 20th percentile, median and 80th percentile of one call, in milliseconds.
        flops: floating-point operations that a call needs at least, or None where they are not counted.
        bytes: that must be moved at least, likewise.
        percent_of_roof: share of what this device could do at best, as measured in the same run; or None.
        error: largest, against float64, relative to the largest magnitude there; 0 for integers and texts.
        versions: of packages.
        commit: of the checkout.
        date: in UTC, ISO 8601.

    Raises:
        ValueError: a field is out of its range.
    """

    op: str
    case: str
    impl: str
    device: str
    dtype: str
    p20: float
    p50: float
    p80: float
    flops: int | None
    bytes: int | None
    percent_of_roof: float | None
    error: float
    versions: str
    commit: str
    date: str

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("op", "impl", "device", "dtype", "versions", "commit", "date"):
            if not getattr(self, name):
                raise ValueError(f"Row: {name} must be given, got {getattr(self, name)!r}")
        if not 0 < self.p20 <= self.p50 <= self.p80 < math.inf:
            raise ValueError(f"Row: times must be 0 < p20 <= p50 <= p80, got {self.p20}, {self.p50}, {self.p80}")
        for name in ("flops", "bytes", "percent_of_roof", "error"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"Row: {name} must be at least 0, got {value}")
        datetime.fromisoformat(self.date)

    @property
    def key(self) -> tuple[str, ...]:
        """What makes rows of two runs the same measurement."""
        return self.op, self.case, self.impl, self.device, self.dtype


def split_name(name: str, B: int) -> tuple[str, str]:
    """``op`` and ``case`` of a case's name and batch: what is done, then variant and shapes.

    >>> split_name("pool_tokens, 16x16x1024", 8)
    ('pool_tokens', '16x16x1024, B=8')
    >>> split_name("  its GEMM", 1)  # indented: a part of the tail
    ('pool_project_fuse', 'its GEMM, B=1')
    """
    if name.startswith(" "):
        name = f"pool_project_fuse, {name.strip()}"
    op, _, variant = name.partition(", ")
    return op, f"{variant}, B={B}" if variant else f"B={B}"


COLUMNS = tuple(field.name for field in fields(Row))
OPTIONAL = ("flops", "bytes", "percent_of_roof")
INTEGERS, NUMBERS = ("flops", "bytes"), ("p20", "p50", "p80", "percent_of_roof", "error")


def read(file: Path) -> list[Row]:
    """The rows of ``file``, in order.

    Raises:
        ValueError: it is no table of results; the message tells the line.
    """
    with file.open(newline="") as source:
        reader = csv.DictReader(source)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{file}: columns must be {', '.join(COLUMNS)}, got {', '.join(reader.fieldnames or ())}")
        rows = []
        for values in reader:
            try:
                rows.append(parse(values))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{file}, line {reader.line_num}: {error}") from error
    return rows


def parse(values: dict[str, str]) -> Row:
    found: dict = dict(values)
    if len(found) != len(COLUMNS) or None in found.values():
        raise ValueError(f"a row must have {len(COLUMNS)} values, got {list(found.values())}")
    for name in INTEGERS + NUMBERS:
        if name in OPTIONAL and not values[name]:
            found[name] = None
        else:
            found[name] = int(values[name]) if name in INTEGERS else float(values[name])
    return Row(**found)


def read_latest(file: Path) -> dict[tuple[str, ...], Row]:
    """The last row of every measurement in ``file``, which may hold several runs."""
    return {row.key: row for row in read(file)}


def append(file: Path, rows: Iterable[Row]) -> None:
    """Add ``rows``, if any, to ``file``, which is made if need be.

    Raises:
        ValueError: the file is no table of results.
    """
    lines = [asdict(row) for row in rows]
    new = not file.exists() or not file.stat().st_size
    if not new:
        read(file)
    if lines:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", newline="") as target:
            writer = csv.DictWriter(target, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(lines)


def tabulate(rows: Sequence[Row]) -> str:
    """``rows`` as text, for people."""
    table = Table("op", "case", "implementation", "p20 ms", "p50 ms", "p80 ms", "% of roof", "error")
    for row in rows:
        times = [f"{value:.4g}" for value in (row.p20, row.p50, row.p80)]
        percent = "" if row.percent_of_roof is None else f"{row.percent_of_roof:.0f}"
        table.add_row(row.op, row.case, row.impl, *times, percent, f"{row.error:.1g}")
    console = Console(width=150)
    with console.capture() as captured:
        console.print(table)
    return captured.get()
