"""The figures of bench.report: a panel for each device, and one that says so where no GPU was measured."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.cases import EAGER, OURS
from bench.committed import (
    NO_GPU,
    Memory,
    Results,
    batches,
    kernels,
    roofs,
    step_times,
    waterfall,
)

__all__ = ["FIGURES", "draw"]

GREY, LIGHT, BLUE, DARK = "#9a9a9a", "#a9cbe8", "#3f87c6", "#12466f"
MARKERS = "os^Dvp*XP<>hH8d"


def draw(results: Results, folder: Path) -> list[Path]:
    """Write every figure; returns their files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, panel in FIGURES.items():
        devices = results.devices()
        panels: list[str | None] = [*devices, *([] if any(map(results.is_gpu, devices)) else [None])]
        widths = [8.2 if device else 2.6 for device in panels]
        sizes = {"figsize": (sum(widths), 5.2), "width_ratios": widths}
        figure, axes = plt.subplots(1, len(panels), squeeze=False, **sizes)
        for ax, device in zip(axes[0], panels, strict=True):
            if device is None or not panel(ax, results, device):
                say(ax, NO_GPU if device is None else f"{device}\nnot measured")
        figure.tight_layout()
        files.append(folder / f"{name}.png")
        save(figure, files[-1])
    if results.flops:
        files.append(folder / "flops.png")
        draw_flops(results.flops, files[-1])
    return files


def draw_flops(found: Mapping[str, Any], file: Path) -> None:
    """The paper's two tables: its fusions beside what was counted, and its projectors."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2))
    fusions = found["fusion"]
    for place, row in enumerate(fusions.values()):
        for offset, value, color in ((-0.2, row["poster"], GREY), (0.2, row["macs"], BLUE)):
            left.barh(place + offset, value / 1e12, color=color, height=0.38)
            left.text(value / 1e12, place + offset, f" {value / 1e12:.2f}", va="center", fontsize=8)
    left.set_yticks(range(len(fusions)), list(fusions), fontsize=9)
    left.invert_yaxis()
    left.set_xlabel("T multiply-adds a video")
    left.set_xlim(0, 1.15 * max(row["poster"] for row in fusions.values()) / 1e12)
    finish(left, "fusion: paper grey, counted from the modules blue")
    projectors = found["projector"]
    for place, row in enumerate(projectors.values()):
        right.barh(place, row["flops"], color=BLUE, height=0.7)
        note = f" {row['flops']:,}; {row['params']:,} parameters"
        right.text(row["flops"], place, note, va="center", fontsize=8)
    right.set_yticks(range(len(projectors)), list(projectors), fontsize=9)
    right.invert_yaxis()
    right.set_xscale("log")
    right.set_xlim(1e5, 1e18)
    right.set_xlabel("operations")
    finish(right, "projectors")
    figure.tight_layout()
    save(figure, file)


def save(figure: Figure, file: Path) -> None:
    """Without a date, so that the same results give the same file."""
    figure.savefig(file, dpi=90, metadata={"Software": None})
    plt.close(figure)


def say(ax: Axes, text: str) -> None:
    """A panel with nothing but words."""
    text = text.replace(" is ", "\nis ")
    ax.text(0.5, 0.5, text, ha="center", va="center", fontsize=12, color="#666666", transform=ax.transAxes)
    ax.set_axis_off()


def bars(ax: Axes, lines: Sequence[tuple[str, float, str, str]], unit: str, title: str) -> None:
    """Horizontal bars from the top: label, length, colour, and what stands at its end."""
    for place, (_, length, color, note) in enumerate(lines):
        ax.barh(place, length, color=color, height=0.7)
        ax.text(length, place, f" {note}", va="center", fontsize=9)
    ax.set_yticks(range(len(lines)), [label for label, *_ in lines], fontsize=9)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.25 * max(length for _, length, *_ in lines))
    finish(ax, title)
    ax.set_xlabel(unit)


def finish(ax: Axes, title: str) -> None:
    ax.set_title(title, fontsize=10, loc="left")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def count_videos(ax: Axes, counts: Sequence[int]) -> None:
    """An axis of powers of two."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(counts, [str(count) for count in counts])


def draw_waterfall(ax: Axes, results: Results, device: str) -> bool:
    if not (found := waterfall(results, device)):
        return False
    lines = []
    for label, row, kind in found.lines:
        color = {"reference": GREY, "alone": LIGHT, "in order": BLUE, "all": DARK}[kind]
        lines.append((label, row.p50, color, f"{row.p50:.0f} ms, x{found.gain(row):.2f}"))
    bars(ax, lines, "milliseconds, median", f"{found.case}\n{device}")
    return True


def draw_steps(ax: Axes, results: Results, device: str) -> bool:
    if not (found := step_times(results, device)):
        return False
    lines = [
        (f"{label}: {impl}", row.p50, GREY if impl == EAGER else BLUE if impl == OURS else LIGHT, f"{row.p50:.1f} ms")
        for label, row, impl in found
    ]
    bars(ax, lines, "milliseconds, median, one video", f"step time\n{device}")
    return True


def draw_roofline(ax: Axes, results: Results, device: str) -> bool:
    found, roof = kernels(results, device), roofs(results, device)
    if not found or roof is None:
        return False
    intensities = [row.flops / row.bytes for row in found]
    low, high = min(intensities) / 2, max(*intensities, roof.flops / roof.bytes) * 2
    xs = [low * (high / low) ** (i / 99) for i in range(100)]
    ax.plot(xs, [min(x * roof.bytes, roof.flops) / 1e9 for x in xs], color="black", linewidth=1)
    names = list(dict.fromkeys((row.op, row.case) for row in found))
    for row, x in zip(found, intensities, strict=True):
        place = names.index((row.op, row.case))
        ours = row.impl == OURS
        style: dict[str, Any] = {"marker": MARKERS[place % len(MARKERS)], "linestyle": "", "color": f"C{place % 10}"}
        label = f"{row.op}, {row.case}" if ours else None
        ax.plot(x, row.flops / row.p50 / 1e6, fillstyle="full" if ours else "none", label=label, **style)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("operations a byte")
    ax.set_ylabel("GFLOP/s")
    ax.legend(fontsize=6, loc="lower right")
    finish(ax, f"roofline: merv_fast filled, eager hollow; line: copy and product of this run\n{device}")
    return True


def draw_batches(ax: Axes, results: Results, device: str) -> bool:
    if not (found := batches(results, device)):
        return False
    for place, ((op, impl), times) in enumerate(found.items()):
        sizes = sorted(times)
        style = {"color": f"C{place // 2 % 10}", "linestyle": "--" if impl == EAGER else "-", "marker": "o"}
        ax.plot(sizes, [1e3 * size / times[size] for size in sizes], label=f"{op}: {impl}", **style)
    count_videos(ax, sorted({size for times in found.values() for size in times}))
    ax.set_ylim(0)
    ax.set_xlabel("videos in a batch")
    ax.set_ylabel("videos a second")
    ax.legend(fontsize=6)
    finish(ax, f"speed against batch\n{device}")
    return True


def draw_memory(ax: Axes, results: Results, device: str) -> bool:
    found = [memory for memory in results.memory if memory.device == device]
    if not found:
        return False
    memory: Memory = found[-1]
    for place, way in enumerate(memory.ways()):
        peaks = memory.peaks_of(way)
        ax.plot(list(peaks), [size / 2**20 for size in peaks.values()], marker="o", color=(GREY, BLUE, DARK)[place % 3])
        ax.annotate(way, (max(peaks), peaks[max(peaks)] / 2**20), fontsize=9, ha="right", va="bottom")
    count_videos(ax, list(memory.peaks_of(memory.ways()[0])))
    ax.set_ylim(0)
    ax.set_xlabel("videos in a call")
    ax.set_ylabel("peak MiB over the weights")
    finish(ax, f"memory of encoding: {memory.case}\n{device}")
    return True


Panel = Callable[[Axes, Results, str], bool]

FIGURES: dict[str, Panel] = {
    "waterfall": draw_waterfall,
    "steps": draw_steps,
    "roofline": draw_roofline,
    "batches": draw_batches,
    "memory": draw_memory,
}
"""By the name of their files; a panel returns whether there was anything to draw."""
