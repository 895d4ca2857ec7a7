"""Native CPU kernels against Pillow and the reference's way: ``python -m bench.cpu [--json FILE]``.

Every line is checked before it is timed: a result that is wrong has no time. The two sides of a line take turns, on
two threads. Exits with 1 where a target is missed.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bench import baselines
from bench.baselines import ReferenceTail
from bench.provenance import commit
from merv_fast.encoders import encoder_config
from merv_fast.ops import pool_project_fuse, pool_tokens, resample_frames
from merv_fast.ops._native import native_fault
from merv_fast.video import Recipe, every
from merv_fast.video.prepare import prepare_all
from tests.budgets import GOLDEN, relative_error

THREADS, ROUNDS = 2, 20
WIDTHS, GRIDS, D = (1024, 1024, 768, 768), ((16, 16), (16, 16), (14, 14), (14, 14)), 4096
QUERY_WIDTH = 3072
"""Of MERV's learned query; its scores are divided by the root of this."""
ENCODERS = {
    "languagebind-video-noclass": 16,
    "dinov2-video-all-tokens": 16,
    "vivit-google-b-all-no-cls-16frames": 32,
    "siglip-vit-b16-224px-all-no-cls": 16,
}
"""MERV's, with the frames that each takes."""
METHODS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Line:
    """Milliseconds (20th percentile, median, 80th) of ours and of the baseline, and the ratio asked for."""

    name: str
    baseline: str
    ours_ms: tuple[float, float, float]
    baseline_ms: tuple[float, float, float]
    target: float | None

    @property
    def ratio(self) -> float:
        return self.baseline_ms[1] / self.ours_ms[1]

    @property
    def missed(self) -> bool:
        return self.target is not None and self.ratio < self.target


def compare(
    name: str, ours: Callable[[], Any], baselines: dict[str, tuple[Callable[[], Any], float | None]]
) -> list[Line]:
    """Time ``ours`` and each baseline in turns."""
    calls = {"": ours} | {key: call for key, (call, _) in baselines.items()}
    seconds: dict[str, list[float]] = {key: [] for key in calls}
    for _ in range(ROUNDS):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[key].append(time.perf_counter() - start)
    spread = {key: percentiles(values) for key, values in seconds.items()}
    return [Line(name, key, spread[""], spread[key], target) for key, (_, target) in baselines.items()]


def percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    fifths = statistics.quantiles(seconds, n=5)
    return tuple(1e3 * value for value in (fifths[0], statistics.median(seconds), fifths[-1]))


def check(right: bool, name: str) -> None:
    if not right:
        sys.exit(f"bench.cpu: {name} is wrong, so it has no time")


def resizing() -> list[Line]:
    """32 frames of 720p for the encoders whose frames Pillow resizes."""
    clip = torch.randint(0, 256, (32, 720, 1280, 3), dtype=torch.uint8)
    jobs = [(16, "bicubic"), (16, "bicubic"), (32, "bilinear")]  # DINOv2, SigLIP, ViViT

    def pillow() -> list[list[np.ndarray]]:
        return [
            [np.asarray(Image.fromarray(f.numpy()).resize((224, 224), METHODS[method])) for f in every(clip, count)]
            for count, method in jobs
        ]

    def each() -> list[Tensor]:
        return [resample_frames(every(clip, count), (224, 224), method) for count, method in jobs]

    def shared() -> list[Tensor]:
        return [resample_frames(every(clip, count), (224, 224), method) for count, method in jobs[1:]]

    for resized, expected in zip(each(), pillow(), strict=True):
        check(np.array_equal(resized.numpy(), np.stack(expected)), "resample_frames")
    lines = compare("resample_frames, pass shared", shared, {"Pillow": (pillow, 8.0)})
    return lines + compare("resample_frames, each encoder", each, {"Pillow": (pillow, 8.0)})


def preparing() -> list[Line]:
    """Pixels to the inputs of all four encoders, LanguageBind's floating-point path on both sides."""
    clip = torch.randint(0, 256, (32, 720, 1280, 3), dtype=torch.uint8)
    recipes = [encoder_config(name, count).recipe for name, count in ENCODERS.items()]
    counts = list(ENCODERS.values())

    def plain(recipe: Recipe, frames: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.mean, recipe.std))
        if recipe.antialias:
            pictures = [Image.fromarray(f.numpy()).resize((224, 224), METHODS[recipe.method]) for f in frames]
            planes = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1).float().div(255) for p in pictures])
            return (planes - mean) / std
        planes = (frames.permute(0, 3, 1, 2) / 255 - mean) / std
        side = int(1280 / 720 * 224)
        planes = F.interpolate(planes, size=(224, side), mode="bilinear", align_corners=False)
        left = round((side - 224) / 2)
        return planes[..., left : left + 224].contiguous()

    def reference() -> list[Tensor]:
        return [plain(recipe, every(clip, count)) for recipe, count in zip(recipes, counts, strict=True)]

    ours = partial(prepare_all, clip, recipes, counts)
    for prepared, expected in zip(ours(), reference(), strict=True):
        check(relative_error(prepared, expected) < GOLDEN, "prepare_all")
    return compare("prepare_all, four encoders", ours, {"Pillow and torch": (reference, None)})


def pooling() -> list[Line]:
    """One video of DINOv2 or LanguageBind features."""
    x = torch.randn(1, 16, 256, 1024)

    def two_dimensional() -> Tensor:
        planes = x.view(16, 16, 16, 1024).permute(0, 3, 1, 2)
        return F.adaptive_avg_pool2d(planes, (8, 8)).permute(0, 2, 3, 1).reshape(1, 16, 64, 1024)

    ours = partial(pool_tokens, x, (16, 16), (8, 8))
    reference = partial(baselines.pool_tokens, x, (16, 16), (8, 8))
    for expected in (reference(), two_dimensional()):
        check(relative_error(ours(), expected) < GOLDEN, "pool_tokens")
    return compare(
        "pool_tokens, 16 slots of 16x16x1024",
        ours,
        {"permute, pool 3D, permute": (reference, 3.0), "permute, pool 2D, permute": (two_dimensional, None)},
    )


def tail() -> list[Line]:
    """Projectors and fusion at MERV's widths, one video, float32."""
    module = ReferenceTail(WIDTHS, GRIDS, D, QUERY_WIDTH).eval()
    xs = [torch.randn(1, 16, H * W, C) for (H, W), C in zip(GRIDS, WIDTHS, strict=True)]
    attention = module.attention
    q_bias, k_bias, _ = attention.in_proj_bias.chunk(3)
    q = (attention.q_proj_weight @ module.query[0, 0] + q_bias) / QUERY_WIDTH**0.5
    query, bias = attention.k_proj_weight.T @ q, (k_bias @ q).expand(4).contiguous()
    weights, biases = [p.weight for p in module.projectors], [p.bias for p in module.projectors]
    compiled = torch.compile(module)
    ours = partial(pool_project_fuse, xs, weights, biases, query, bias, GRIDS, (8, 8))
    for baseline in (module, compiled):
        for got, expected in zip(ours(), baseline(xs), strict=True):
            check(relative_error(got, expected) < GOLDEN, "pool_project_fuse")
    return compare(
        "pool_project_fuse, MERV's widths",
        ours,
        {"eager reference": (partial(module, xs), 1.0), "compiled reference": (partial(compiled, xs), 1.0)},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    arguments = parser.parse_args()
    if fault := native_fault("cpu"):
        sys.exit(f"bench.cpu: the native kernels do not serve: {fault}")
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    with torch.inference_mode():
        lines = [*resizing(), *preparing(), *pooling(), *tail()]
    print(f"{'':36}{'against':28}{'ours, ms':>24}{'theirs, ms':>26}{'ratio':>8}{'target':>8}")
    for line in lines:
        spreads = [f"{median:.1f} ({low:.1f}-{high:.1f})" for low, median, high in (line.ours_ms, line.baseline_ms)]
        target = "" if line.target is None else f">= {line.target:g}"
        print(f"{line.name:36}{line.baseline:28}{spreads[0]:>24}{spreads[1]:>26}{line.ratio:8.2f}{target:>8}")
    if arguments.json:
        versions = {"torch": torch.__version__, "pillow": PIL.__version__, "python": platform.python_version()}
        setting = {"threads": THREADS, "rounds": ROUNDS, "machine": cpu(), "versions": versions}
        setting |= {"commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
        rows = [asdict(line) | {"ratio": line.ratio} for line in lines]
        arguments.json.write_text(json.dumps(setting | {"lines": rows}, indent=1) + "\n")
    if missed := [line for line in lines if line.missed]:
        sys.exit("missed: " + "; ".join(f"{line.name} against {line.baseline}" for line in missed))


def cpu() -> str:
    """The processor's name where Linux tells it."""
    try:
        rows = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        rows = []
    return next((row.split(":")[1].strip() for row in rows if row.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
