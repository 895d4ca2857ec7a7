"""What computes the encoders' attention fastest: ``python -m bench.attention [--json FILE]``.

Every backend at hand at the shape of each of MERV's encoders, from the packed linear layer's output to the joined
heads: held against the definition in float64, then timed, in turns; on a GPU in bfloat16 and as CUDA graphs, on a CPU
at the shapes of small encoders in float32. Backends that are not at hand are listed with the reason. Exits with 1
where one that is at hand was wrong.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.cases import MERV, Case, Setup, Way
from bench.clock import pin_threads
from bench.comparison import Comparison, Entry, Roofs
from bench.encoders import encoder_configs, product_of
from bench.provenance import name_device, today
from bench.table import Row, append, tabulate
from merv_fast.encoders import EncoderConfig
from merv_fast.kernels._launch import Cost
from merv_fast.modules.attention_backends import BACKENDS, backend_version, check_backend, load_backend

__all__ = ["Found", "entry", "main", "measure", "write"]

BATCHES = (1, 8)
MARK = " (fastest)"


@dataclass
class Found:
    """Rows of what was right, by median; why backends were not tried; and what was wrong."""

    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def fastest(self) -> dict[str, str]:
        """The backend with the smallest median, by case."""
        best: dict[str, Row] = {}
        for row in self.rows:
            if row.case not in best or row.p50 < best[row.case].p50:
                best[row.case] = row
        return {case: row.impl for case, row in best.items()}


def measure(setup: Setup, batches: Sequence[int] = BATCHES) -> Found:
    """Verify and time every backend that serves, at each encoder and batch."""
    found, about, roofs = Found(), today(), Roofs()
    about["versions"] = "; ".join([about["versions"], *name_packages()])
    for config in encoder_configs(setup.device).values():
        backends = at_hand(setup, config.width // config.heads, found.left_out)
        for B in batches:
            comparison = Comparison(entry(setup, config, B, backends), roofs)
            for name in backends:
                try:
                    found.rows.append(comparison.row(name, about))
                except Exception as error:
                    where = ", ".join(comparison.entry.names)
                    found.failures.append(f"{where}: {name}: {type(error).__name__}: {error}")
            del comparison
            gc.collect()
            if setup.device == "cuda":
                torch.cuda.empty_cache()
    return found


def at_hand(setup: Setup, head_size: int, left_out: dict[str, str]) -> list[str]:
    """Backends that serve for heads of that size; the reasons of others are written down."""
    device, names = torch.empty(0, device=setup.device).device, []
    for name in BACKENDS:
        try:
            check_backend(name, head_size, device, setup.dtype)
            names.append(name)
        except (ImportError, RuntimeError, ValueError) as error:
            left_out[name] = str(error).removeprefix("attention: ")
    return names


def entry(setup: Setup, config: EncoderConfig, B: int, backends: Sequence[str]) -> Entry:
    """The attention of one block of an encoder over ``B`` videos."""
    rows, tokens = sequences(config)

    def make() -> tuple[Tensor]:
        return (setup.rand(B * rows, tokens, 3 * config.width),)

    def call(qkv: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, config.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return attend(q, k, v).transpose(1, 2).flatten(2)

    def cost(qkv: Tensor) -> Cost:
        numbers = qkv.numel() + qkv.numel() // 3
        return Cost(4 * B * rows * tokens**2 * config.width, numbers * qkv.element_size())

    eager = partial(call, attend=load_backend("eager"))
    ways = [Way(name, partial(call, attend=load_backend(name)), [eager]) for name in backends]
    op = f"attention, {config.family}, {rows} x {tokens} tokens, {config.heads} heads of {config.width // config.heads}"
    return Entry(Case(op, B, make, eager, ways, cost), setup, product_of(config, B), graph=True)


def sequences(config: EncoderConfig) -> tuple[int, int]:
    """Sequences that a video is, and tokens in each."""
    slots, (height, width) = config.num_frames // config.tubelet, config.patch_grid
    if config.attention == "joint":
        return 1, config.prefix_tokens + slots * height * width
    return slots, config.prefix_tokens + height * width


def name_packages() -> Iterator[str]:
    """The packages of backends that are installed, with their versions."""
    for name, backend in BACKENDS.items():
        if version := backend_version(name):
            yield f"{backend.package} {version}"


def write(found: Found, setup: Setup, file: Path) -> None:
    """Everything to ``file``, and the rows beside it as CSV."""
    dtype, fastest = str(setup.dtype).removeprefix("torch."), found.fastest
    setting = {"device": name_device(setup.device), "dtype": dtype} | today()
    rows = [asdict(row) | {"fastest": fastest[row.case] == row.impl} for row in found.rows]
    more = {"rows": rows, "fastest": fastest, "left_out": found.left_out, "failures": found.failures}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(setting | more, indent=1) + "\n")
    beside = file.with_suffix(".csv")
    beside.unlink(missing_ok=True)
    append(beside, found.rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything to this file, and the rows beside it as CSV")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    setup = Setup(options.device, torch.bfloat16 if options.device == "cuda" else torch.float32, MERV)
    if options.device == "cpu":
        pin_threads()
    found = measure(setup)
    if options.json:
        write(found, setup, options.json)
    fastest = found.fastest
    print(tabulate([replace(r, impl=r.impl + MARK * (fastest[r.case] == r.impl)) for r in found.rows]))
    print(f"{name_device(setup.device)}, {str(setup.dtype).removeprefix('torch.')}")
    for name, reason in found.left_out.items():
        print(f"not at hand: {name}: {reason}")
    for line in found.failures:
        print(f"FAILED: {line}")
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
