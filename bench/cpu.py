"""The operators on the CPU as cases, against Pillow and the reference's way: ``python -m bench.cpu [--json FILE]``.

The command times the native kernels alone and holds them to targets; ``pytest bench/ --benchmark`` times every case.
Every result is verified before it is timed: one that is wrong has no time. The ways of a case take turns, on two
threads. The command exits with 1 where a target is missed.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import baselines, cases
from bench.baselines import PILLOW
from bench.cases import COMPILED, EAGER, MERV, OURS, TAIL, Case, Setup, Shapes, Way
from bench.clock import pin_threads, spread
from bench.comparison import Comparison, Entry
from bench.pairs import Line, conclude
from merv_fast.encoders import encoder_config
from merv_fast.kernels._launch import Cost
from merv_fast.models.configuration import MERV_BASE
from merv_fast.ops import resample_frames
from merv_fast.ops._native import native_fault
from merv_fast.video import every
from merv_fast.video.prepare import prepare_all

__all__ = ["COUNTS", "RECIPES", "entries", "prepare_each"]

RECIPES, COUNTS = [encoder_config(name, count).recipe for name, count in MERV_BASE.items()], list(MERV_BASE.values())
"""Of MERV's encoders: how frames are prepared, and how many each takes."""

REAL = MERV._replace(batches=(1,), compiled=())
SHORT = REAL._replace(slots=4, D=1024, query_width=768)
"""What a CPU would take seconds for: a video of four slots for a narrower language model."""

LEAST = 20
"""Repeats, at least, of what is compared with a target."""

RESIZE, PREPARE, POOL = "resample_frames, three encoders", "prepare_all, four encoders", "pool_tokens, 16x16x1024"
SHARED, POOL_2D, BY_PILLOW, BY_TORCH = "pass shared", "permute, pool 2D, permute", "Pillow", "Pillow and torch"

LINES = (
    ("resample_frames, pass shared", RESIZE, SHARED, BY_PILLOW, 8.0),
    ("resample_frames, each encoder", RESIZE, OURS, BY_PILLOW, 8.0),
    (PREPARE, PREPARE, OURS, BY_TORCH, None),
    ("pool_tokens, 16 slots of 16x16x1024", POOL, OURS, EAGER, 3.0),
    ("pool_tokens, 16 slots of 16x16x1024", POOL, OURS, POOL_2D, None),
    ("pool_project_fuse, MERV's widths", TAIL, OURS, EAGER, 1.0),
    ("pool_project_fuse, MERV's widths", TAIL, OURS, COMPILED, 1.0),
)
"""What the command prints: name, case, our way, the other, and the ratio asked for."""


def entries() -> Iterator[Entry]:
    """The ops at MERV's shapes, one video, float32; with an MLP, and trained, at `SHORT`."""
    setup, short = (Setup("cpu", torch.float32, shapes) for shapes in (REAL, SHORT))
    yield from (tail_entry(case, setup) for case in cases.tail_cases(setup, hidden=False))
    for make in (cases.pool_tokens_cases, partial(cases.pool_project_cases, hidden=False), cases.fuse_cases):
        yield from (operator_entry(case, setup) for case in make(setup))
    yield from (operator_entry(case, setup) for case in cases.temporal_cases(setup))
    yield Entry(resizing(), setup, product_of(REAL), native=True, least=LEAST)
    yield Entry(preparing(), setup, native=True, least=LEAST)
    for make in (partial(cases.tail_cases, hidden=True), cases.tail_training_cases):
        for case in make(short):
            op = f"{case.op}, {SHORT.slots} slots, D={SHORT.D}"
            yield operator_entry(case._replace(op=op), short)


def operator_entry(case: Case, setup: Setup) -> Entry:
    if case.op.startswith("pool_tokens, "):
        return Entry(with_two_dimensions(case), setup, product_of(setup.shapes), least=LEAST)
    return Entry(case, setup, product_of(setup.shapes))


def product_of(shapes: Shapes) -> tuple[int, int, int]:
    """The one GEMM of the tail."""
    return shapes.S, sum(shapes.widths), shapes.D


def tail_entry(case: Case, setup: Setup) -> Entry:
    """The reference's tail is compiled too."""
    eager = next(way for way in case.ways if way.name == EAGER)
    compiled = Way(COMPILED, cases.compile_once(eager.call), [eager.call])
    return Entry(case._replace(ways=[*case.ways, compiled]), setup, product_of(setup.shapes), least=LEAST)


def with_two_dimensions(case: Case) -> Case:
    """What pooling over space alone costs, which is the same where slots are not pooled."""

    def pool(x: Tensor) -> Tensor:
        B, T, N, C = x.shape
        side = int(N**0.5)
        planes = x.view(B * T, side, side, C).permute(0, 3, 1, 2)
        return F.adaptive_avg_pool2d(planes, (8, 8)).permute(0, 2, 3, 1).reshape(B, T, 64, C)

    return case._replace(ways=[*case.ways, Way(POOL_2D, pool)])


def make_clip() -> tuple[Tensor]:
    """32 frames of 720p."""
    frames, H, W = MERV.clip
    return (torch.randint(0, 256, (frames, H, W, 3), dtype=torch.uint8),)


def resizing() -> Case:
    """For the encoders whose frames Pillow resizes; it is what is right, to the bit."""
    size = MERV.size
    jobs = [(recipe.method, n) for recipe, n in zip(RECIPES, COUNTS, strict=True) if recipe.antialias]
    distinct = list(dict.fromkeys(jobs))

    def pillow(clip: Tensor) -> list[Tensor]:
        from PIL import Image

        return [
            torch.from_numpy(
                np.stack([Image.fromarray(f.numpy()).resize(size, PILLOW[method]) for f in every(clip, count)])
            )
            for method, count in jobs
        ]

    def each(clip: Tensor) -> list[Tensor]:
        return [resample_frames(every(clip, count), size, method) for method, count in jobs]

    def shared(clip: Tensor) -> list[Tensor]:
        return [resample_frames(every(clip, count), size, method) for method, count in distinct]

    def dealt(pictures: list[Tensor]) -> list[Tensor]:
        return [pictures[distinct.index(job)] for job in jobs]

    def cost(clip: Tensor) -> Cost:
        each = [cases.resample_cost(every(clip, n), size, method, n * 3 * size[0] * size[1]) for method, n in distinct]
        return Cost(sum(one.flops for one in each), sum(one.bytes for one in each))

    ways = [Way(OURS, each, [pillow]), Way(SHARED, shared, [pillow], dealt), Way(BY_PILLOW, pillow, [pillow])]
    return Case(RESIZE, 1, make_clip, pillow, ways, cost)


def preparing() -> Case:
    """Pixels to the inputs of all four encoders, LanguageBind's floating-point path included."""

    def ours(clip: Tensor) -> list[Tensor]:
        return prepare_all(clip, RECIPES, COUNTS)

    def cost(clip: Tensor) -> Cost:
        written = sum(4 * 3 * n * recipe.size**2 for recipe, n in zip(RECIPES, COUNTS, strict=True))
        return Cost(0, clip.numel() + written)

    low = partial(prepare_each, dtype=torch.float32)
    ways = [Way(OURS, ours, [low]), Way(BY_TORCH, low, [low])]
    return Case(PREPARE, 1, make_clip, prepare_each, ways, cost)


def prepare_each(clip: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The reference's way for every encoder."""
    return [baselines.prepare(every(clip, count), recipe, dtype) for recipe, count in zip(RECIPES, COUNTS, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    arguments = parser.parse_args()
    if fault := native_fault("cpu"):
        sys.exit(f"bench.cpu: the native kernels do not serve: {fault}")
    pin_threads()
    lines: list[Line] = []
    for entry in entries():
        comparison = Comparison(entry)
        for name, op, ours, baseline, target in LINES:
            if op == entry.case.op:
                times = (spread(comparison.milliseconds(impl)) for impl in (ours, baseline))
                lines.append(Line(name, baseline, *times, target))
    conclude(lines, arguments.json, {"pillow": PIL.__version__})


if __name__ == "__main__":
    main()
