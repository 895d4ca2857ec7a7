"""Two ways of doing the same on the CPU, timed in turns, so that their ratio survives a busy machine."""

import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.clock import THREADS, Timing, spread, time_on_cpu
from bench.provenance import commit, processor

__all__ = ["THREADS", "Line", "check", "compare", "conclude"]

ROUNDS = 20


@dataclass(frozen=True)
class Line:
    """Milliseconds (20th percentile, median, 80th) of ours and of the baseline, and the ratio asked for."""

    name: str
    baseline: str
    ours_ms: Timing
    baseline_ms: Timing
    target: float | None

    @property
    def ratio(self) -> float:
        return self.baseline_ms[1] / self.ours_ms[1]

    @property
    def missed(self) -> bool:
        return self.target is not None and self.ratio < self.target


def compare(
    name: str,
    ours: Callable[[], Any],
    baselines: dict[str, tuple[Callable[[], Any], float | None]],
    rounds: int = ROUNDS,
) -> list[Line]:
    """Time ``ours`` and each baseline, given with the ratio asked for, in turns, without a warm-up."""
    calls = {"": ours} | {key: call for key, (call, _) in baselines.items()}
    taken = [[time_on_cpu(call)() for call in calls.values()] for _ in range(rounds)]
    spreads = dict(zip(calls, map(spread, zip(*taken, strict=True)), strict=True))
    return [Line(name, key, spreads[""], spreads[key], target) for key, (_, target) in baselines.items()]


def check(right: bool, name: str) -> None:
    """Leave if what is to be timed is wrong."""
    if not right:
        sys.exit(f"{name} is wrong, so it has no time")


def conclude(lines: Sequence[Line], to: Path | None, versions: dict[str, str], **more: Any) -> None:
    """Print a table, write the lines and where they come from to ``to``; leave with 1 where a target is missed."""
    print(f"{'':36}{'against':28}{'ours, ms':>24}{'theirs, ms':>26}{'ratio':>8}{'target':>8}")
    for line in lines:
        spreads = [f"{median:.1f} ({low:.1f}-{high:.1f})" for low, median, high in (line.ours_ms, line.baseline_ms)]
        target = "" if line.target is None else f">= {line.target:g}"
        print(f"{line.name:36}{line.baseline:28}{spreads[0]:>24}{spreads[1]:>26}{line.ratio:8.2f}{target:>8}")
    if to:
        versions = {"torch": torch.__version__, "python": platform.python_version()} | versions
        setting = {"threads": THREADS, "machine": processor(), "versions": versions, "commit": commit()}
        setting |= {"date": datetime.now(UTC).isoformat(timespec="seconds")} | more
        rows = [asdict(line) | {"ratio": line.ratio} for line in lines]
        to.write_text(json.dumps(setting | {"lines": rows}, indent=1) + "\n")
    if missed := [line for line in lines if line.missed]:
        sys.exit("missed: " + "; ".join(f"{line.name} against {line.baseline}" for line in missed))
