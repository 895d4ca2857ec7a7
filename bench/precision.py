"""What each precision costs in accuracy, and takes in time: ``python -m bench.precision [--json FILE]``.

Features of the four encoders, their shares in the fusion, and visual tokens, against float32 (on a GPU without TF32);
one video, random pixels, random weights, of full size on a GPU and small on a CPU. Errors are relative, by the 2-norm;
that of the shares is the largest difference. With trained weights they will be others.
"""

import argparse
import copy
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.cases import MERV, Setup
from bench.clock import pin_threads, spread, take_turns
from bench.encoders import encoder_configs, rand_pixels, sizes, video_model
from bench.provenance import name_device, today
from merv_fast.models.video_model import MervVideoModel
from merv_fast.modules import to_fp8

__all__ = ["PRECISIONS", "Outcome", "measure"]

PRECISIONS = ("float16", "bfloat16", "fp8")

LEAST = {"cuda": 10, "cpu": 2}
"""Repeats; processors without such numbers take their time."""


@dataclass(frozen=True)
class Outcome:
    """Errors of a precision against float32, and milliseconds of encoding at the median."""

    precision: str
    features: dict[str, float]
    shares: float
    tokens: float
    milliseconds: float


def measure(device: str) -> list[Outcome]:
    """float32 first."""
    setup = Setup(device, torch.float32, MERV)
    torch.manual_seed(0)
    exact = video_model(setup, encoder_configs(device))
    pixels = [rand_pixels(setup, 1, config) for config in encoder_configs(device).values()]
    models = {"float32": exact} | {name: in_precision(exact, name) for name in PRECISIONS}
    with torch.no_grad():
        results = {name: run(model, pixels) for name, model in models.items()}
        ways = [[partial(model.encode, [x.to(model.dtype) for x in pixels])] for model in models.values()]
        times = [spread(taken).p50 for taken in take_turns(ways, device, least=LEAST[device])]
    return [
        compare(name, list(exact.encoders), results[name], results["float32"], time)
        for name, time in zip(models, times, strict=True)
    ]


def in_precision(model: MervVideoModel, name: str) -> MervVideoModel:
    """A copy; of fp8 everything but the blocks' linear layers is bfloat16."""
    model = copy.deepcopy(model).to(getattr(torch, "bfloat16" if name == "fp8" else name))
    if name == "fp8":
        to_fp8(model.encoders)
    return model


def run(model: MervVideoModel, pixels: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Features, shares ``[E]`` and visual tokens, in float32."""
    features = model.encode([x.to(model.dtype) for x in pixels])
    output = model.fuse(features)
    return [x.float() for x in features], output.encoder_weights[0].float(), output.pooler_output.float()


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
    outcomes = measure(device)
    table = Table("precision", *outcomes[0].features, "shares", "visual tokens", "encoding, ms")
    for outcome in outcomes:
        errors = [*outcome.features.values(), outcome.shares, outcome.tokens]
        table.add_row(outcome.precision, *(f"{error:.2g}" for error in errors), f"{outcome.milliseconds:.1f}")
    Console(width=120).print(table)
    if arguments.json:
        about = {"case": f"four encoders, {sizes(encoder_configs(device)['dinov2'])}", "device": name_device(device)}
        found = {"precisions": [asdict(outcome) for outcome in outcomes]}
        arguments.json.write_text(json.dumps(about | today() | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
