"""Every kernel on a GPU, checked and timed: ``python -m bench.kernels [--json FILE] [--device cpu|cuda] [--small]``.

A case is made, compared with float64 within the budgets of the tests, and only then timed: a result that is wrong
has no time, and the exit code is 1. A time is that of a captured graph with a cold L2; the one beside it is that of
the same call launched from Python. The roof is measured in the same run: a large copy, and cuBLAS's product of
1024B x 3584 x 4096. On a CPU the kernels run in Triton's interpreter and are checked, not timed.
"""

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__" and (not torch.cuda.is_available() or "cpu" in sys.argv):
    # Before Triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import cases as catalogue
from bench import table as results
from bench.cases import (
    BLOCK,
    COMPILED,
    CUBLAS,
    EAGER,
    GEMM,
    MERV,
    OURS,
    PACKED,
    RESAMPLE,
    SMALL,
    STREAM,
    TAIL,
    TEMPORAL,
    TEMPORAL_TRAINING,
    Case,
    Setup,
    Way,
    gemm_cost,
    serving,
    tensors_of,
)
from bench.clock import Timing, measure
from bench.provenance import commit, name_device, today
from bench.table import split_name
from bench.targets import Target
from bench.verify import WrongResult, in_float64, in_other_memory, verify
from merv_fast.kernels._launch import Cost
from merv_fast.ops._kernels import KERNELS
from merv_fast.ops._native import native_fault

SECONDS = 200


@dataclass
class Row:
    """A result that was right; times in milliseconds, None where they were not taken."""

    op: str
    B: int
    way: str
    dtype: str
    error: float
    flops: int
    bytes: int
    timing: Timing | None = None
    launched: Timing | None = None
    roof_ms: float | None = None

    @property
    def percent(self) -> float | None:
        return 100 * self.roof_ms / self.timing.p50 if self.roof_ms and self.timing else None


@dataclass
class Run:
    """What a run has found so far."""

    setup: Setup
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    bandwidth: float | None = None
    """Bytes a second of a large copy, read and written."""

    def time(self, op: str, B: int, way: str, launched: bool = False) -> float | None:
        """The median of a row, if it was timed."""
        for row in self.rows:
            if (row.op, row.B, row.way) == (op, B, way):
                timing = row.launched if launched else row.timing
                return timing.p50 if timing else None
        return None

    def ratio(self, op: str, B: int, over: str, under: str = OURS, launched: bool = False) -> float | None:
        """How many times longer ``over`` takes."""
        top, bottom = self.time(op, B, over, launched), self.time(op, B, under, launched)
        return top / bottom if top and bottom else None

    def roof(self, cost: Cost, B: int) -> float | None:
        """Milliseconds that a call must take by the roofs of this run."""
        gemm = self.time(GEMM, B, CUBLAS)
        if self.bandwidth is None or gemm is None:
            return None
        whole = gemm_cost(self.setup.shapes, B, self.setup.dtype.itemsize)
        return max(cost.flops / whole.flops * gemm, 1e3 * cost.bytes / self.bandwidth)


def examine(run: Run, case: Case) -> None:
    """Check every way of a case, and time those that are right."""
    torch.manual_seed(case.B)
    with torch.no_grad():
        arguments = case.make()
        wide = in_float64(arguments)
        exact = list(tensors_of(catalogue.referenced(case.exact)(*wide)))
        cost = case.cost(*arguments)
        for way in case.ways:
            label = f"{case.op.strip()}, B={case.B}, {way.name}"
            try:
                error = error_of(run, way, arguments, wide, exact)
            except Exception as fault:
                run.failures.append(f"{label}: {describe(fault)}")
                continue
            row = Row(case.op, case.B, way.name, str(run.setup.dtype).removeprefix("torch."), error, *cost)
            run.rows.append(row)
            if run.setup.device == "cuda":
                calls = [partial(way.call, *arguments), partial(way.call, *in_other_memory(arguments))]
                try:
                    row.timing = measure(calls, "cuda", graph=True)
                    row.launched = measure(calls, "cuda", seconds=0.05)
                except Exception as error:
                    run.failures.append(f"{label}: not timed: {describe(error)}")
                row.roof_ms = run.roof(cost, case.B)


def error_of(run: Run, way: Way, arguments: tuple, wide: tuple, exact: list[Tensor]) -> float:
    """`verify`, our kernels in Triton's interpreter where there is no GPU."""
    interpreted = serving(KERNELS, "cpu") if run.setup.device == "cpu" else None
    return verify(way, arguments, wide, exact, run.setup.dtype, interpreted)


def describe(error: Exception) -> str:
    if isinstance(error, WrongResult):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


KINDS = ("elementwise", "attention", "product", "other")


def dissect(run: Run, case: Case) -> dict[str, Any]:
    """The kernels of a compiled block: their times, and what its elementwise ones must move."""
    arguments, repeats = case.make(), 30
    call = next(way.call for way in case.ways if way.name == COMPILED)
    with torch.no_grad():
        for _ in range(3):
            call(*arguments)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(repeats):
                call(*arguments)
            torch.cuda.synchronize()
    kernels = [
        {
            "name": event.key,
            "kind": kind_of(event.key),
            "launches": event.count / repeats,
            "us": event.self_device_time_total / repeats,
        }
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    U = arguments[0].numel() * arguments[0].element_size()
    # The norm: in, out. Sum and norm: two in, two out. GELU on four times the width: in, out. The last sum: two in,
    # out. With temporal attention also: embedding and norm, in and two out; and the first norm follows a sum.
    passes = 2 + 4 + 8 + 3 + (3 + 2 if "temporal" in case.op else 0)
    seconds = 1 / run.bandwidth if run.bandwidth else float("nan")
    return {
        "block": case.op,
        "kernels": sorted(kernels, key=lambda kernel: -kernel["us"]),
        "us": {kind: sum(k["us"] for k in kernels if k["kind"] == kind) for kind in KINDS},
        "elementwise_bytes": passes * U,
        "elementwise_floor_us": 1e6 * passes * U * seconds,
        # The hidden layer would not be read and written once more.
        "gelu_epilogue_saves_at_most_us": 1e6 * 8 * U * seconds,
        # Each sum would not be written by the product and read again.
        "sum_epilogues_save_at_most_us": 1e6 * 2 * (3 if "temporal" in case.op else 2) * U * seconds,
    }


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    if kernel.startswith("triton_"):
        return "product" if re.match("triton_(tem|mm)", kernel) else "elementwise"
    if re.search("flash|fmha|attend|sdpa|attention", kernel):
        return "attention"
    if re.search("gemm|nvjet|cutlass|splitK|cublas", kernel):
        return "product"
    return "elementwise" if re.search("elementwise|norm|gelu|copy|Memcpy", kernel, re.IGNORECASE) else "other"


def targets(run: Run) -> list[Target]:
    """What was asked for, and what this run found."""
    batches, found = run.setup.shapes.batches, []
    for B, most in ((1, 1.35), (8, 1.2)):
        gemm, ours = run.time(GEMM, B, CUBLAS), run.time(TAIL, B, OURS)
        measured = ours / gemm if gemm and ours else None
        found.append(Target(f"{TAIL}, B={B}: it over the cuBLAS GEMM", measured, most, at_most=True))
    for launched in (False, True):
        how = "launched" if launched else "graphs"
        for B in batches:
            for way, least in ((EAGER, 4.0), (COMPILED, 2.0)):
                measured = run.ratio(TAIL, B, way, launched=launched)
                found.append(Target(f"{TAIL}, B={B}: {way} tail over it, {how}", measured, least))
    for op, way in ((TEMPORAL, STREAM), (TEMPORAL_TRAINING, PACKED)):
        found += [Target(f"{op}, B={B}: {way} over it", run.ratio(op, B, way), 2.0) for B in batches]
    for B in batches:
        for method in ("bicubic", "bilinear"):
            op = f"{RESAMPLE}, {method}"
            rows = [row for row in run.rows if (row.op, row.B) == (op, B) and row.timing]
            share = 1e3 * rows[0].bytes / run.bandwidth / rows[0].timing.p50 if rows and run.bandwidth else None
            found.append(Target(f"{op}, B={B}: share of copy bandwidth", share, 0.6))
    return found


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    source = torch.randint(0, 256, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    timing = measure([lambda: target.copy_(source)], "cuda", graph=True, seconds=0.2)
    return 2e3 * source.numel() / timing.p50


def about(run: Run) -> dict[str, Any]:
    """Device, versions, commit, date and shapes."""
    return {
        "device": torch.cuda.get_device_name() if run.setup.device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "shapes": run.setup.shapes._asdict(),
        "copy_bytes_per_second": run.bandwidth,
    }


def write(run: Run, file: Path) -> None:
    """All of a run as JSON, and its rows beside it as CSV."""
    setting = about(run)
    result = setting | {
        "rows": [asdict(row) | {"op": row.op.strip(), "percent_of_roof": row.percent} for row in run.rows],
        "targets": [asdict(target) | {"verdict": target.verdict} for target in targets(run)],
        "blocks": run.blocks,
        "failures": run.failures,
        "left_out": run.left_out,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    beside = file.with_suffix(".csv")
    beside.unlink(missing_ok=True)
    results.append(beside, rows_of(run))


def rows_of(run: Run) -> Iterator[results.Row]:
    """What was timed, in the long form of all results; beside a graph's time that of launches from Python."""
    device, about = name_device(run.setup.device), today()
    for row in run.rows:
        op, case = split_name(row.op, row.B)
        for impl, timing in ((row.way, row.timing), (f"{row.way}, launched", row.launched)):
            if timing:
                percent = 100 * row.roof_ms / timing.p50 if row.roof_ms else None
                counted = row.flops or None, row.bytes or None, percent, row.error
                yield results.Row(op, case, impl, device, row.dtype, *timing, *counted, **about)


def show(run: Run) -> None:
    """Tables of the rows, of the blocks' kernels, and of the targets."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table("op", "B", "way", "p20 us", "p50 us", "p80 us", "launched us", "TFLOP/s", "TB/s", "% of roof")
    for row in run.rows:
        if row.timing is None:
            table.add_row(row.op, str(row.B), row.way, "", "not timed")
            continue
        times = [f"{1e3 * each:.1f}" for each in (*row.timing, *([row.launched.p50] if row.launched else []))]
        rates = [f"{row.flops / row.timing.p50 / 1e9:.1f}", f"{row.bytes / row.timing.p50 / 1e9:.2f}"]
        percent = f"{row.percent:.0f}" if row.percent else ""
        table.add_row(row.op, str(row.B), row.way, *times, *[""] * (4 - len(times)), *rates, percent)
    console.print(table)
    for block in run.blocks:
        table = Table("kernel", "kind", "launches", "us", title=f"{block['block']}, compiled")
        for kernel in block["kernels"]:
            table.add_row(kernel["name"][:90], kernel["kind"], f"{kernel['launches']:g}", f"{kernel['us']:.1f}")
        console.print(table)
        print("  ".join(f"{kind} {us:.1f} us" for kind, us in block["us"].items()))
        print(f"elementwise floor {block['elementwise_floor_us']:.1f} us; epilogues would save at most:", end=" ")
        print(f"GELU {block['gelu_epilogue_saves_at_most_us']:.1f} us,", end=" ")
        print(f"sums {block['sum_epilogues_save_at_most_us']:.1f} us")
    if run.setup.device == "cuda":
        table = Table("target", "asked", "measured", "verdict")
        for target in targets(run):
            measured = "" if target.measured is None else f"{target.measured:.2f}"
            table.add_row(target.name, f"{'<=' if target.at_most else '>='} {target.asked:g}", measured, target.verdict)
        console.print(table)
    for title, lines in (("not run", run.left_out), ("FAILED", run.failures)):
        for line in lines:
            print(f"{title}: {line}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything to this file, and the rows beside it as CSV")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to check only")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"begin no case after so many ({SECONDS})")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu where PyTorch finds no CUDA GPU, got cuda")
    # The interpreter's products of bfloat16 are wrong.
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float16
    run = Run(Setup(options.device, dtype, SMALL if options.small else MERV))
    started = time.monotonic()
    if options.device == "cuda":
        run.bandwidth = copy_bandwidth()
    native = native_fault("cuda") if options.device == "cuda" else None
    for case in catalogue.cases(run.setup):
        name = f"{case.op.strip()}, B={case.B}"
        if native and case.op.startswith("resample"):
            run.left_out.append(f"{name}: native CUDA kernels: {native}")
        elif time.monotonic() - started > options.seconds:
            run.left_out.append(f"{name}: no time left")
        else:
            try:
                examine(run, case)
                if case.op.startswith(BLOCK) and run.time(case.op, case.B, COMPILED):
                    run.blocks.append(dissect(run, case))
            except Exception as error:
                run.failures.append(f"{name}: {describe(error)}")
            if options.json:
                # What there is survives a run that is cut short.
                write(run, options.json)
    show(run)
    if options.json:
        write(run, options.json)
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
