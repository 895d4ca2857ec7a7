"""docs/benchmarks.md and its figures, from what is committed in bench/results: ``python -m bench.report``.

Nothing is measured here. Where no GPU result is committed yet, the page and its figures say so.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.committed import NO_GPU, Results, batches, kernels, read_results, step_times, waterfall
from bench.figures import draw
from bench.table import Row

__all__ = ["write"]

ROOT = Path(__file__).parent.parent


def page(results: Results, figures: str) -> str:
    """Markdown; ``figures`` is their folder as the page sees it."""
    sections = [
        ("From the reference's way to ours", "waterfall", waterfall_tables(results)),
        ("Step time", "steps", step_tables(results)),
        ("Kernels and operators", "roofline", kernel_tables(results)),
        ("Speed against batch", "batches", batch_tables(results)),
        ("Memory", "memory", memory_tables(results)),
        ("Precision", None, precision_tables(results)),
        ("Against Pillow, decord and one question at a time, on a CPU", None, pair_tables(results)),
        ("Operations and parameters", "flops" if results.flops else None, flops_tables(results)),
    ]
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m bench.report` from `bench/results`; every number there was verified against the",
        "reference's way before it was timed. `bench/README.md` tells how to measure.",
    ]
    if not any(map(results.is_gpu, results.devices())):
        lines += ["", f"**{NO_GPU}**"]
    for title, figure, tables in sections:
        lines += ["", f"## {title}"]
        if figure:
            lines += ["", f"![{title}]({figures}/{figure}.png)"]
        found = list(tables)
        for table in found or ["Not measured."]:
            lines += ["", table]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; columns whose title ends in ``>`` hold numbers."""
    titles = [title.removesuffix(" >") for title in head]
    rule = ["---:" if title.endswith(" >") else "---" for title in head]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [titles, rule, *rows])


def conditions(row: Row) -> str:
    """Where a row comes from."""
    return f"{row.device}; {row.dtype}; {row.versions}; {source(row.commit, row.date)}."


def source(commit: str, date: str) -> str:
    """Which code was measured, and when."""
    return f"commit {commit[:12]}, {date[:10]}"


def waterfall_tables(results: Results) -> Iterator[str]:
    for device in results.devices():
        if found := waterfall(results, device):
            rows = [
                (label, *milliseconds(row), f"{found.gain(row):.2f}", f"{row.error:.1g}")
                for label, row, _ in found.lines
            ]
            yield f"{found.case}. {conditions(found.lines[-1][1])}"
            yield table(["way", "p20 ms >", "p50 ms >", "p80 ms >", "times as fast >", "error >"], rows)


def step_tables(results: Results) -> Iterator[str]:
    for device in results.devices():
        if found := step_times(results, device):
            yield conditions(found[0][1])
            rows = [(label, impl, *milliseconds(row), row.case) for label, row, impl in found]
            yield table(["what", "way", "p20 ms >", "p50 ms >", "p80 ms >", "case"], rows)


def kernel_tables(results: Results) -> Iterator[str]:
    for device in results.devices():
        found = kernels(results, device)
        ops = dict.fromkeys((row.op, row.case) for row in found)
        rows = [row for row in results.of(device) if (row.op, row.case) in ops]
        if rows:
            yield conditions(rows[0])
            lines = [
                (row.op, row.case, row.impl, *milliseconds(row), percent(row.percent_of_roof), f"{row.error:.1g}")
                for row in rows
            ]
            head = ["op", "case", "way", "p20 ms >", "p50 ms >", "p80 ms >", "% of roof >", "error >"]
            yield table(head, lines)


def batch_tables(results: Results) -> Iterator[str]:
    for device in results.devices():
        for (op, impl), times in batches(results, device).items():
            pairs = ", ".join(f"B={B}: {1e3 * B / times[B]:.1f} videos/s" for B in sorted(times))
            yield f"- {op}, {impl}, {device}: {pairs}"


def memory_tables(results: Results) -> Iterator[str]:
    for memory in results.memory:
        about = memory.about
        yield f"{memory.case}; {memory.device}; {source(about['commit'], about['date'])}. MiB over the weights."
        counts = list(memory.peaks_of(memory.ways()[0]))
        rows = [(way, *(f"{size / 2**20:.0f}" for size in memory.peaks_of(way).values())) for way in memory.ways()]
        yield table(["way", *(f"{count} videos >" for count in counts)], rows)


def precision_tables(results: Results) -> Iterator[str]:
    for found in results.precisions:
        where = f"{found['device']}; {source(found['commit'], found['date'])}"
        for case, outcomes in found["precisions"].items():
            asked = outcomes[0]["right"] is not None
            yield f"{case}; {where}. Errors against float32{', and answers that are right' if asked else ''}."
            rows = [
                (
                    outcome["precision"],
                    *(
                        f"{error:.2g}"
                        for error in (*outcome["features"].values(), outcome["shares"], outcome["tokens"])
                    ),
                    f"{outcome['milliseconds']:.1f}",
                    *([str(outcome["right"])] if asked else []),
                )
                for outcome in outcomes
            ]
            names = [*outcomes[0]["features"], "shares", "tokens", "encoding, ms", *(["right"] if asked else [])]
            yield table(["precision", *(f"{name} >" for name in names)], rows)


def pair_tables(results: Results) -> Iterator[str]:
    for name, found in results.pairs.items():
        where = f"{found['machine']}, {found['threads']} threads"
        yield f"`bench.{name}`: {where}; {source(found['commit'], found['date'])}."
        rows = [
            (
                line["name"],
                line["baseline"],
                f"{line['ours_ms'][1]:.1f}",
                f"{line['baseline_ms'][1]:.1f}",
                f"{line['ratio']:.2f}",
                "" if line["target"] is None else f"{line['target']:g}",
                "" if line["target"] is None else "met" if line["ratio"] >= line["target"] else "**missed**",
            )
            for line in found["lines"]
        ]
        yield table(["what", "against", "ours, ms >", "theirs, ms >", "ratio >", "at least >", ""], rows)


def flops_tables(results: Results) -> Iterator[str]:
    if (found := results.flops) is None:
        return
    yield "Of the paper's tables, counted from our modules; `python -m bench.flops` prints how each is put together."
    projectors = [(name, f"{row['params']:,}", f"{row['flops']:,}") for name, row in found["projector"].items()]
    yield table(["projector", "parameters >", "operations >"], projectors)
    fusions = []
    for name, row in found["fusion"].items():
        counted, paper = row["macs"], row["poster"]
        apart = f"{100 * (counted / paper - 1):+.2f}"
        fusions.append((name, f"{paper / 1e12:.2f}", f"{counted / 1e12:.4f}", apart))
    yield table(["fusion", "paper, T >", "counted, T >", "apart, % >"], fusions)
    keys = list(next(iter(found["alike"].values())))
    alike = [(name, *(f"{row[key] / 1e12:.4f}" for key in keys)) for name, row in found["alike"].items()]
    yield "All counted alike, T multiply-adds:"
    yield table(["fusion", *(f"{key.replace('_', ' ')} >" for key in keys)], alike)


def milliseconds(row: Row) -> list[str]:
    return [f"{value:.4g}" for value in (row.p20, row.p50, row.p80)]


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def write(results: Results, docs: Path) -> list[Path]:
    """The page and its figures; returns their files."""
    files = draw(results, docs / "figures")
    target = docs / "benchmarks.md"
    target.write_text(page(results, "figures"))
    return [target, *files]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    for file in write(read_results(arguments.results), arguments.docs):
        print(file)


if __name__ == "__main__":
    main()
