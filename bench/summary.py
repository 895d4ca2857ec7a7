"""What bench/gpu_suite.sh found, in at most 40 lines: ``python -m bench.summary FOLDER``.

Everything is in the folder: this only says what to look at. Exits with 1 if a stage failed.
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.cases import EAGER, OURS
from bench.table import Row, read_latest
from bench.targets import of_the_model

__all__ = ["MOST", "summarise"]

MOST = 39
"""Lines, and one of the suite's own."""

TOLD = re.compile(r"\d+ (passed|failed|error)|(ERROR|RACECHECK) SUMMARY|NOT FINITE| rows in |no CUDA|not found")
"""What a stage's log says of itself."""


def summarise(folder: Path) -> tuple[list[str], bool]:
    """The lines, and whether every stage succeeded."""
    stages = [line.split() for line in (folder / "stages.txt").read_text().splitlines()]
    lines = [f"{name:14} {verdict(code):10} {seconds:>4} s  {told(folder, name)}" for name, code, seconds in stages]
    lines += kernels(folder / "kernels.json")
    lines += model(folder / "bench.csv")
    lines += at_most(5, failed_tests(folder))
    lines += at_most(4, [line for log in folder.glob("tune.log") for line in grep(log, ": best ")])
    return at_most(MOST, lines), all(code == "0" for _, code, _ in stages)


def verdict(code: str) -> str:
    return {"0": "ok", "124": "cut short", "127": "not there"}.get(code, f"FAILED {code}")


def told(folder: Path, stage: str) -> str:
    """The last line of a log that says how it went."""
    found = grep(folder / f"{stage}.log", TOLD)
    return found[-1].strip("= ")[:100] if found else ""


def kernels(file: Path) -> list[str]:
    """Where it ran, the targets that were missed, and what went wrong."""
    try:
        found = json.loads(file.read_text())
    except OSError:
        return ["bench.kernels left no results"]
    verdicts = [target["verdict"] for target in found["targets"]]
    counts = ", ".join(f"{verdicts.count(each)} {each}" for each in ("met", "missed", "not measured"))
    missed = [
        f"  missed: {each['name']}: {'<=' if each['at_most'] else '>='} {each['asked']:g}, got {each['measured']:.2f}"
        for each in found["targets"]
        if each["verdict"] == "missed"
    ]
    where = f"{found['device']}, torch {found['torch']}, triton {found['triton']}"
    return [
        f"{where}, commit {found['commit'][:12]}, {found['date']}",
        f"targets of the kernels: {counts}",
        *at_most(7, missed),
        *at_most(4, [f"  failed: {line}" for line in found["failures"]]),
        *at_most(2, [f"  left out: {line}" for line in found["left_out"]]),
    ]


def model(file: Path) -> list[str]:
    """What `pytest bench/ --benchmark` found: the targets of the whole model, and each case."""
    if not file.exists():
        return ["pytest bench/ --benchmark left no results"]
    rows = list(read_latest(file).values())
    return [f"  {target}" for target in of_the_model(rows)] + at_most(7, ratios(rows))


def ratios(rows: Iterable[Row]) -> list[str]:
    """Each case: ours, and how many times as long the others take."""
    cases: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        cases.setdefault((row.op, row.case), {})[row.impl] = row.p50
    lines = []
    for (op, case), times in cases.items():
        if OURS in times:
            others = [f"{impl} x{time / times[OURS]:.2f}" for impl, time in times.items() if impl != OURS]
            lines.append(f"{op}, {case}: {times[OURS]:.3f} ms; {', '.join(others) or f'{EAGER} not measured'}")
    return lines


def failed_tests(folder: Path) -> list[str]:
    return [line[:150] for log in sorted(folder.glob("*.log")) for line in grep(log, "^(FAILED|ERROR) ")]


def grep(file: Path, pattern: str | re.Pattern) -> list[str]:
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    return [line for line in lines if re.search(pattern, line)]


def at_most(count: int, lines: Iterable[str]) -> list[str]:
    """``lines``, of which the last tells how many were left out."""
    lines = list(lines)
    return lines if len(lines) <= count else [*lines[: count - 1], f"  ... and {len(lines) - count + 1} more"]


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        sys.exit("usage: python -m bench.summary FOLDER")
    lines, right = summarise(Path(arguments[0]))
    print("\n".join(lines))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
