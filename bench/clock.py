"""The one timer: how long a call takes on a GPU with a cold cache, by events; or on the CPU, by its clock."""

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merv_fast.remembered import Constants

__all__ = ["THREADS", "Timing", "capture", "measure", "pin_threads", "spread", "take_turns"]

Call = Callable[[], Any]

LEAST, MOST = 10, 400
"""Repeats of a measurement."""

THREADS = 2
"""Of a measurement on the CPU."""


class Timing(NamedTuple):
    """Milliseconds of one call: 20th percentile, median, 80th percentile."""

    p20: float
    p50: float
    p80: float


def measure(calls: Sequence[Call], device: str, *, graph: bool = False, seconds: float = 0.1) -> Timing:
    """How long one way takes, by `take_turns` with itself; on CUDA with ``graph`` as captured graphs.

    Graphs leave the host's launches out of the time.
    """
    graph = graph and device == "cuda"
    (times,) = take_turns([[capture(call) for call in calls] if graph else calls], device, graph=graph, seconds=seconds)
    return spread(times)


def take_turns(
    ways: Sequence[Sequence[Call]], device: str, *, graph: bool = False, seconds: float = 0.1, least: int = LEAST
) -> list[list[float]]:
    """Milliseconds of every run of every way, one of each in turn, so that their ratios survive a busy machine.

    The order within a turn is drawn anew each time: in caches and allocators a way finds what another has left there,
    and the first of a turn finds nothing. A way is one or more calls that do the same with different tensors and are
    rotated through. On CUDA a buffer larger than L2 is written before each run, outside of what is timed. The GPU then
    waits for the call, so that one that launches more slowly than the GPU works is timed as slow as it launches.

    Args:
        ways: at least one, each of at least one call.
        device: "cuda", the current one, or "cpu", where caches are left as they are.
        graph: whether calls replay what `capture` made, which needs no waiting.
        seconds: about how long to warm up each way, and then to measure it, unless ``least`` repeats take longer.
        least: repeats of each way.
    """

    def run(turn: int, calls: Sequence[Call]) -> Callable[[], float]:
        call = calls[turn % len(calls)]
        return time_on_gpu(call, wait=not graph) if device == "cuda" else time_on_cpu(call)

    started = time.perf_counter()
    for warmed in count(1):
        for calls in ways:
            run(warmed, calls)
        if device == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
        if elapsed >= seconds * len(ways) and warmed >= max(map(len, ways)):
            break
    repeats = repeats_in(seconds * len(ways), elapsed / warmed, least)
    taken: list[list[Callable[[], float]]] = [[] for _ in ways]
    shuffled = random.Random(0)
    for turn in range(repeats):
        for way in shuffled.sample(range(len(ways)), len(ways)):
            taken[way].append(run(turn, ways[way]))
    if device == "cuda":
        torch.cuda.synchronize()
    return [[read() for read in reads] for reads in taken]


def time_on_cpu(call: Call) -> Callable[[], float]:
    """Run ``call``; what is returned tells its milliseconds."""
    start = time.perf_counter()
    call()
    elapsed = 1e3 * (time.perf_counter() - start)
    return lambda: elapsed


def time_on_gpu(call: Call, wait: bool) -> Callable[[], float]:
    """Run ``call`` with a cold L2; what is returned tells its milliseconds once the GPU is done."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    larger_than_cache().zero_()
    if wait:
        # Or the host would launch while the GPU still writes, and its time would not show.
        torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    return lambda: start.elapsed_time(end)


def pin_threads(threads: int = THREADS) -> None:
    """Give PyTorch so many threads, and this process as many CPUs, on different cores where Linux tells them apart.

    To be called first: threads that run already stay where they are.
    """
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        firsts = sorted({siblings(cpu): cpu for cpu in reversed(allowed)}.values())
        os.sched_setaffinity(0, [*firsts, *(cpu for cpu in allowed if cpu not in firsts)][:threads])


def siblings(cpu: int) -> str:
    """Which CPUs share a core with this one; itself where nothing is known."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def capture(call: Call) -> Call:
    """``call``, captured as a CUDA graph: what is returned replays it, weights being what they are now."""
    constants = Constants()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), constants:
        # Compiles kernels and makes handles, which a capture may not.
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side), constants:
        call()

    # What the graph reads lives as long as this.
    def replay(constants: Constants = constants) -> None:
        graph.replay()

    return replay


@lru_cache(maxsize=1)
def larger_than_cache() -> Tensor:
    """Four times L2."""
    return torch.empty(4 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8, device="cuda")


def repeats_in(seconds: float, each: float, least: int = LEAST) -> int:
    return min(MOST, max(least, math.ceil(seconds / each)))


def spread(times: Sequence[float]) -> Timing:
    """20th percentile, median and 80th percentile of two or more times."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(fifths[0], statistics.median(times), fifths[3])
