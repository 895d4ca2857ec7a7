"""The one timer: how long a call takes on a GPU with a cold cache, by events; or on the CPU, by its clock."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Timing", "capture", "measure", "spread"]

Call = Callable[[], Any]

LEAST, MOST = 10, 400
"""Repeats of a measurement."""


class Timing(NamedTuple):
    """Milliseconds of one call: 20th percentile, median, 80th percentile."""

    p20: float
    p50: float
    p80: float


def measure(calls: Sequence[Call], device: str, *, graph: bool = False, seconds: float = 0.1) -> Timing:
    """Time ``calls``, which do the same with different tensors, in turns.

    On CUDA a buffer larger than L2 is written before each of them, outside of what is timed. With ``graph`` each is
    captured once and replayed, which leaves the host's launches out of the time; without, the GPU waits for the call,
    and one that launches more slowly than the GPU works is timed as slow as it launches.

    Args:
        calls: at least one; rotated through.
        device: "cuda", the current one, or "cpu", where caches are left as they are.
        graph: CUDA only.
        seconds: about how long to warm up, and then to measure, unless LEAST repeats take longer.
    """
    if device == "cpu":
        return _measure_cpu(calls, seconds)
    runs = [capture(call) for call in calls] if graph else list(calls)
    cold = larger_than_cache()
    started = time.perf_counter()
    for warmed in count(1):
        runs[warmed % len(runs)]()
        cold.zero_()
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
        if elapsed >= seconds and warmed >= len(runs):
            break
    repeats = repeats_in(seconds, elapsed / warmed)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (start, end) in enumerate(events):
        cold.zero_()
        if not graph:
            # Or the host would launch while the GPU still writes, and its time would not show.
            torch.cuda.synchronize()
        start.record()
        runs[i % len(runs)]()
        end.record()
    torch.cuda.synchronize()
    return spread([start.elapsed_time(end) for start, end in events])


def capture(call: Call) -> Call:
    """``call``, captured as a CUDA graph: what is returned replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # Compiles kernels and makes handles, which a capture may not.
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@lru_cache(maxsize=1)
def larger_than_cache() -> Tensor:
    """Four times L2."""
    return torch.empty(4 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8, device="cuda")


def _measure_cpu(calls: Sequence[Call], seconds: float) -> Timing:
    started = time.perf_counter()
    for warmed in count(1):
        calls[warmed % len(calls)]()
        elapsed = time.perf_counter() - started
        if elapsed >= seconds and warmed >= len(calls):
            break
    times = []
    for i in range(repeats_in(seconds, elapsed / warmed)):
        start = time.perf_counter()
        calls[i % len(calls)]()
        times.append(1e3 * (time.perf_counter() - start))
    return spread(times)


def repeats_in(seconds: float, each: float) -> int:
    return min(MOST, max(LEAST, math.ceil(seconds / each)))


def spread(times: Sequence[float]) -> Timing:
    """20th percentile, median and 80th percentile of two or more times."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(fifths[0], statistics.median(times), fifths[3])
