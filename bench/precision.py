"""What each precision costs in accuracy, and takes in time: ``python -m bench.precision [--json FILE]``.

Features of the four encoders, their shares in the fusion, and visual tokens, against float32 (on a GPU without TF32):
of one video of random pixels and random weights, of full size on a GPU and small on a CPU; and, where there is PyAV, of
merv-tiny, whose weights are trained, on the bundled clips, with the answers that are right. Errors are relative, by the
2-norm; that of the shares is the largest difference.
"""

import argparse
import copy
import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.cases import MERV, Setup
from bench.clock import pin_threads, spread, take_turns
from bench.encoders import encoder_configs, rand_pixels, sizes, video_model
from bench.provenance import name_device, today
from merv_fast import MervModel, load_frames, load_vid
from merv_fast.assets import examples
from merv_fast.models.video_model import MervVideoModel
from merv_fast.modules import to_fp8

__all__ = ["PRECISIONS", "Outcome", "measure", "measure_trained"]

PRECISIONS = ("float16", "bfloat16", "fp8")

LEAST = {"cuda": 10, "cpu": 2}
"""Repeats; processors without such numbers take their time."""


@dataclass(frozen=True)
class Outcome:
    """Errors of a precision against float32, milliseconds of encoding at the median, and right answers, if asked."""

    precision: str
    features: dict[str, float]
    shares: float
    tokens: float
    milliseconds: float
    right: int | None = None


def measure(device: str) -> list[Outcome]:
    """Full size or small, random; float32 first."""
    setup = Setup(device, torch.float32, MERV)
    torch.manual_seed(0)
    exact = video_model(setup, encoder_configs(device))
    pixels = [rand_pixels(setup, 1, config) for config in encoder_configs(device).values()]
    return outcomes(device, {name: in_precision(exact, name) for name in ("float32", *PRECISIONS)}, pixels)


def measure_trained(device: str) -> list[Outcome]:
    """merv-tiny on the bundled clips; float32 first."""
    vidlm = load_vid("merv-tiny").to(device, dtype=torch.float32)
    frames = [load_frames(example.clip, max(vidlm.config.num_frames)).movedim(-1, 1) for example in examples()]
    models = {name: in_precision(vidlm, name) for name in ("float32", *PRECISIONS)}
    pixels = vidlm.model.video_model.prepare(frames)
    found = outcomes(device, {name: model.model.video_model for name, model in models.items()}, pixels)
    return [replace(each, right=answered(model)) for each, model in zip(found, models.values(), strict=True)]


def answered(vidlm: MervModel) -> int:
    """How many of the bundled questions get the right answer."""
    right = 0
    for example in examples():
        builder = vidlm.get_prompt_builder()
        builder.add_turn(role="human", message=example.question)
        text = vidlm.generate(example.clip, builder.get_prompt(), do_sample=False, max_new_tokens=16)
        right += text == example.answer
    return right


def outcomes(device: str, models: dict[str, MervVideoModel], pixels: list[Tensor]) -> list[Outcome]:
    """Of each model, the first of which is exact."""
    exact, *_ = models.values()
    with torch.no_grad():
        results = [run(model, pixels) for model in models.values()]
        ways = [[partial(model.encode, [x.to(model.dtype) for x in pixels])] for model in models.values()]
        times = [spread(taken).p50 for taken in take_turns(ways, device, least=LEAST[device])]
    return [
        compare(name, list(exact.encoders), result, results[0], time)
        for name, result, time in zip(models, results, times, strict=True)
    ]


def in_precision(model: Any, name: str) -> Any:
    """A copy; of fp8 everything but the linear layers of the encoders' blocks is bfloat16."""
    model = copy.deepcopy(model).to(dtype=getattr(torch, "bfloat16" if name == "fp8" else name))
    if name == "fp8":
        to_fp8((model if isinstance(model, MervVideoModel) else model.model.video_model).encoders)
    return model


def run(model: MervVideoModel, pixels: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Features, shares ``[B, E]`` and visual tokens, in float32."""
    features = model.encode([x.to(model.dtype) for x in pixels])
    output = model.fuse(features)
    return [x.float() for x in features], output.encoder_weights.float(), output.pooler_output.float()


def compare(name: str, encoders: list[str], got: tuple, exact: tuple, milliseconds: float) -> Outcome:
    features = {encoder: apart(x, right) for encoder, x, right in zip(encoders, got[0], exact[0], strict=True)}
    return Outcome(name, features, (got[1] - exact[1]).abs().max().item(), apart(got[2], exact[2]), milliseconds)


def apart(x: Tensor, exact: Tensor) -> float:
    return (nn.functional.mse_loss(x, exact).sqrt() / exact.square().mean().sqrt()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        pin_threads()
    found = {f"four encoders, random, {sizes(encoder_configs(device)['dinov2'])}": measure(device)}
    if find_spec("av"):
        found[f"merv-tiny, trained, {len(examples())} clips"] = measure_trained(device)
    for case, each in found.items():
        show(case, each)
    if arguments.json:
        precisions = {case: [asdict(outcome) for outcome in each] for case, each in found.items()}
        about = {"device": name_device(device)} | today()
        arguments.json.write_text(json.dumps(about | {"precisions": precisions}, indent=1) + "\n")


def show(case: str, found: list[Outcome]) -> None:
    table = Table("precision", *found[0].features, "shares", "tokens", "encoding, ms", "right", title=case)
    for outcome in found:
        errors = [*outcome.features.values(), outcome.shares, outcome.tokens]
        right = "" if outcome.right is None else str(outcome.right)
        table.add_row(outcome.precision, *(f"{error:.2g}" for error in errors), f"{outcome.milliseconds:.1f}", right)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
