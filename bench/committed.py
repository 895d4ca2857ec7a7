"""What is in bench/results, as the report wants it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.cases import EAGER, OURS
from bench.encoders import SERIAL
from bench.front_end import FRONT_END
from bench.steps import FIRST_TOKEN
from bench.table import Row, read_latest
from bench.waterfall import ANSWERS, TECHNIQUES, names

__all__ = [
    "NO_GPU",
    "Memory",
    "Results",
    "Roof",
    "Waterfall",
    "batches",
    "kernels",
    "read_results",
    "roofs",
    "step_times",
    "waterfall",
]

NO_GPU = "No GPU result is committed yet."


@dataclass(frozen=True)
class Memory:
    """What bench.memory found: ``peaks`` are its numbers, ``about`` where they come from."""

    case: str
    device: str
    about: Mapping[str, str]
    peaks: list[dict[str, Any]]

    def ways(self) -> list[str]:
        return list(dict.fromkeys(peak["way"] for peak in self.peaks))

    def peaks_of(self, way: str) -> dict[int, int]:
        """Bytes by number of videos."""
        return {peak["B"]: peak["peak_bytes"] for peak in self.peaks if peak["way"] == way}


@dataclass(frozen=True)
class Results:
    """Everything that is committed; of a measurement that was repeated the last."""

    rows: list[Row]
    memory: list[Memory]
    precisions: list[dict[str, Any]]
    pairs: dict[str, dict[str, Any]]
    flops: dict[str, Any] | None

    def devices(self) -> list[str]:
        """GPUs last."""
        found = dict.fromkeys(row.device for row in self.rows)
        return sorted(found, key=self.is_gpu)

    @staticmethod
    def is_gpu(device: str) -> bool:
        return not re.search(r", \d+ threads$", device)

    def of(self, device: str) -> list[Row]:
        return [row for row in self.rows if row.device == device]


def read_results(folder: Path) -> Results:
    """The tables (``*.csv``) and the scripts' JSON files under ``folder``, in the order of their names.

    Raises:
        ValueError: a file is no table of results, or no JSON.
    """
    latest: dict[tuple[str, ...], Row] = {}
    for file in sorted(folder.rglob("*.csv")):
        latest |= read_latest(file)
    memory, precisions, pairs, flops = [], [], {}, None
    for file in sorted(folder.rglob("*.json")):
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        if "peaks" in found:
            about = {name: found[name] for name in ("versions", "commit", "date")}
            memory.append(Memory(found["case"], found["device"], about, found["peaks"]))
        elif "precisions" in found:
            precisions.append(found)
        elif "projector" in found:
            flops = found
        elif "lines" in found:
            pairs[file.stem] = found
    return Results(list(latest.values()), memory, precisions, pairs, flops)


class Waterfall(NamedTuple):
    """Label, row and kind of each bar, from the reference's way to all techniques."""

    case: str
    lines: list[tuple[str, Row, str]]

    def gain(self, row: Row) -> float:
        """How many times as fast as the reference's way."""
        return self.lines[0][1].p50 / row.p50


TOLD = {
    "decode": "decode what is wanted",
    "prepare": "resample for all encoders at once",
    "encode": "run the blocks that matter (on a GPU side by side)",
    "fuse": "the tail as one product",
    "once": "encode and prefill a video once",
}


def waterfall(results: Results, device: str) -> Waterfall | None:
    """None where the reference's way or ours was not measured."""
    rows = {row.impl: row for row in results.of(device) if row.op == ANSWERS}
    if EAGER not in rows or OURS not in rows:
        return None
    lines = []
    for name, chosen in names().items():
        if name not in rows:
            continue
        if not chosen:
            lines.append(("the reference's way", rows[name], "reference"))
        elif len(chosen) == 1:
            lines.append((f"alone: {TOLD[name]}", rows[name], "alone"))
            if name == TECHNIQUES[0]:
                first = (f"1. {TOLD[name]}", rows[name], "in order")
        else:
            if len(chosen) == 2 and TECHNIQUES[0] in rows:
                lines.append(first)
            kind = "all" if name == OURS else "in order"
            lines.append((f"{len(chosen)}. + {TOLD[TECHNIQUES[len(chosen) - 1]]}", rows[name], kind))
    return Waterfall(rows[OURS].case, lines)


def step_times(results: Results, device: str) -> list[tuple[str, Row, str]]:
    """What, its row, and whose way, of one video: single encoders, all four, to visual tokens, to the first token."""
    found = []
    for row in results.of(device):
        if row.impl not in (EAGER, OURS, SERIAL) or not row.case.endswith("B=1"):
            continue
        if row.op == "encoder":
            found.append((row.case.partition(",")[0], row, row.impl))
        elif row.op == "encoders":
            found.append(("all four", row, row.impl))
        elif row.op == FRONT_END:
            found.append(("front end", row, row.impl))
        elif row.op == FIRST_TOKEN:
            found.append(("whole model", row, row.impl))
    order = ["all four", "front end", "whole model"]
    return sorted(found, key=lambda each: order.index(each[0]) + 1 if each[0] in order else 0)


def kernels(results: Results, device: str) -> list[Row]:
    """Ours and eager rows with operations and bytes."""
    rows = [row for row in results.of(device) if row.impl in (OURS, EAGER) and not row.op.startswith("roof")]
    return [row for row in rows if row.flops and row.bytes]


class Roof(NamedTuple):
    """Operations and bytes a second: the best product and the copy of the run."""

    flops: float
    bytes: float


def roofs(results: Results, device: str) -> Roof | None:
    """None where they are not in the table."""
    rows = [row for row in results.of(device) if row.op == "roof"]
    products = [1e3 * row.flops / row.p50 for row in rows if row.flops]
    copies = [1e3 * row.bytes / row.p50 for row in rows if row.bytes and not row.flops]
    return Roof(max(products), max(copies)) if products and copies else None


def batches(results: Results, device: str) -> dict[tuple[str, str], dict[int, float]]:
    """Milliseconds by batch, of what was measured at several."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in results.of(device):
        case, _, batch = row.case.rpartition("B=")
        if row.impl in (OURS, EAGER) and batch.isdigit() and row.op != "roof":
            found.setdefault((f"{row.op}, {case}".rstrip(", "), row.impl), {})[int(batch)] = row.p50
    return {key: times for key, times in found.items() if len(times) > 1}
