"""Peak memory of encoding, over the weights: ``python -m bench.memory [--json FILE]``.

Every measurement is a process of its own. On a GPU it is what PyTorch counts, of the encoders at full size; on a CPU
the resident memory of small ones, as Linux tells it. Features are compared with those of a video encoded alone before a
number counts. Exits with 1 if one is wrong.
"""

import argparse
import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from bench import baselines
from bench.baselines import ReferenceEncoder
from bench.cases import EAGER, MERV, Setup
from bench.clock import pin_threads
from bench.encoders import encoder_configs, place, rand_pixels, sizes, video_model
from bench.provenance import name_device, today
from tests.budgets import relative_error

__all__ = ["BATCHES", "WAYS", "Peak", "measure"]

BATCHES = (1, 4, 16)
WAYS = {EAGER: None, "merv_fast": None, "merv_fast, a video at a time": 1}
"""With the budget of bytes that each has for what it encodes at a time."""

CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""To what is encoded alone, whose products may be rounded in another order."""


@dataclass(frozen=True)
class Peak:
    """Bytes that encoding ``B`` videos took at most, over what was there before; ``error`` is relative."""

    way: str
    B: int
    peak_bytes: int
    results_bytes: int
    error: float


def measure(way: str, B: int, device: str) -> Peak:
    """In this process, which should have done nothing else."""
    setup = Setup(device, torch.bfloat16 if device == "cuda" else torch.float32, MERV)
    torch.manual_seed(B)
    configs = encoder_configs(device)
    model = video_model(setup, configs)
    model.encode_budget = WAYS[way]
    encode: Callable[[list[Tensor]], list[Tensor]] = model.encode
    if way == EAGER:
        wholes = place(setup, nn.ModuleList(ReferenceEncoder(encoder) for encoder in model.encoders.values()))
        encode = partial(baselines.encode, wholes)
    pixels = [rand_pixels(setup, B, config) for config in configs.values()]
    with torch.no_grad():
        alone = model.encode([x[-1:] for x in pixels])
        encode([x[:1] for x in pixels])
        start = forget(device)
        features = encode(pixels)
        peak = most(device) - start
    error = max(relative_error(many[-1:], one) for many, one in zip(features, alone, strict=True))
    return Peak(way, B, peak, sum(x.nbytes for x in features), error)


def forget(device: str) -> int:
    """Bytes held now; from here on the most is counted anew."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # What was freed goes back to the system, or it would be used again unseen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def most(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM")


def resident(name: str) -> int:
    """Bytes, as Linux tells them of this process."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        sys.exit(f"bench.memory: this system does not tell {name}")
    return int(found[1]) * 1024


def in_process(way: str, B: int, device: str) -> Peak:
    command = [sys.executable, "-m", "bench.memory", "--device", device, "--one", way, str(B)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "B"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        pin_threads()
    if arguments.one:
        print(json.dumps(asdict(measure(arguments.one[0], int(arguments.one[1]), arguments.device))))
        return
    jobs = [(way, B) for B in BATCHES for way in WAYS]
    peaks = [in_process(way, B, arguments.device) for way, B in track(jobs, "encoding")]
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    wrong = [f"{peak.way}, B={peak.B}: {peak.error:.2g}" for peak in peaks if not peak.error <= CLOSE[dtype]]
    if wrong:
        sys.exit("wrong, so nothing counts: " + "; ".join(wrong))
    table = Table("videos", "way", "peak MiB", "of which results")
    for peak in peaks:
        table.add_row(str(peak.B), peak.way, *(f"{size / 2**20:.0f}" for size in (peak.peak_bytes, peak.results_bytes)))
    Console().print(table)
    if arguments.json:
        about = {"case": f"four encoders, {sizes(encoder_configs(arguments.device)['dinov2'])}"}
        about |= {"device": name_device(arguments.device), "dtype": str(dtype).removeprefix("torch.")} | today()
        arguments.json.write_text(json.dumps(about | {"peaks": [asdict(peak) for peak in peaks]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
