"""Which backend of attention serves an encoder best, decided by import or by measurement, once.

``flash_attention`` is the newest release of flash-attention that serves; ``fastest`` is whatever takes the least time
at the shapes of the heads that the encoder makes of one video.
"""

import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merv_fast.modules.attention_backends import (
    BACKENDS,
    Attend,
    check_backend,
    discrepancy,
    load_backend,
    name_dtype,
    numbers,
)

__all__ = ["CHOICES", "AttentionChoice", "HeadShapes", "choose_fastest", "choose_flash_attention"]

CHOICES = ("fastest", "flash_attention")
"""Names that stand for one of ``BACKENDS``."""

FLASH = ("flash_attention_4", "flash_attention_3", "flash_attention_2")

TIE = 1.03
"""How much longer than the fastest ``sdpa`` may take and be chosen all the same: so much is noise."""

SECONDS, LEAST, MOST = 0.1, 3, 100
"""About how long all backends together are measured at one shape, and repeats."""

FILLED = 2**26
"""Bytes that are at least written on a GPU before each call that is timed, so that it waits for the host's launch."""


@dataclass(frozen=True)
class AttentionChoice:
    """What was chosen to compute the attention of an encoder, and why.

    Args:
        name: the backend, a key of ``BACKENDS``.
        milliseconds: what the attention in all blocks takes for one video, by backend; empty unless it was measured.
        left_out: backends that could not be chosen, by the reason.
        where: the device and dtype in which it was measured, in words.

    Example:
        >>> print(AttentionChoice("sdpa", {"xformers": 2.5, "sdpa": 2.0}, where="NVIDIA H200, bfloat16"))
        sdpa: sdpa 2.00 ms, xformers 2.50 ms a video on NVIDIA H200, bfloat16
    """

    name: str
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    where: str = ""

    def __str__(self) -> str:
        if not self.milliseconds:
            return self.name
        times = sorted(self.milliseconds.items(), key=lambda pair: pair[1])
        return f"{self.name}: {', '.join(f'{name} {ms:.2f} ms' for name, ms in times)} a video on {self.where}"


class View(NamedTuple):
    """How a tensor lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> "View":
        """That of ``tensor``."""
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    @property
    def end(self) -> int:
        """Numbers from the start of the memory to behind the last one."""
        return self.offset + 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))


class HeadShapes(NamedTuple):
    """The views that a block's attention is given, ``[R, heads, tokens, d]``."""

    q: View
    k: View
    v: View

    def fill(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Such q, k and v, in one memory as if they had come from one linear layer."""
        memory = numbers(max(view.end for view in self), device, dtype)
        return [memory.as_strided(*view) for view in self]


Found = tuple[dict[str, float], dict[str, str]]
"""Milliseconds of one call by backend, and what was wrong with others."""

FOUND: dict[tuple[object, ...], Found] = {}
LOCK = Lock()


def choose_flash_attention(
    head_sizes: Collection[int], device: torch.device | None, dtype: torch.dtype | None
) -> AttentionChoice:
    """The newest flash-attention that can be imported and serves, as far as device and dtype are known.

    Raises:
        ImportError, ValueError, RuntimeError: there is none; the message has the reason for each.
    """
    refused: dict[str, Exception] = {}
    for name in FLASH:
        error = refusal(name, head_sizes, device, dtype)
        if error is None:
            return AttentionChoice(name, left_out=reasons(refused))
        refused[name] = error
    # That a package is missing is less to the point than that another, which is there, does not serve.
    kind = next((type(error) for error in refused.values() if not isinstance(error, ImportError)), ImportError)
    rule = f"one of {', '.join(FLASH)} that serves here (or choose sdpa)"
    raise kind(f"attention: flash_attention must be {rule}, got {listed(reasons(refused))}")


def choose_fastest(
    shapes: Sequence[tuple[HeadShapes, int]], device: torch.device, dtype: torch.dtype
) -> AttentionChoice:
    """The backend that takes the least time for an encoder; ``sdpa`` where it is as good as that.

    Every backend at hand but ``eager`` is compared with ``eager`` at these shapes, then timed, in turns and without
    gradients: on a GPU by events on the current stream, with a cold L2 and without the host's launches. What was found
    is remembered for the process: another encoder like this one, on a device of this kind, is not measured again.

    Args:
        shapes: what the blocks are given for one video, each with the number of blocks.
        device: a GPU or the CPU.
        dtype: of the heads.

    Raises:
        ValueError: neither a GPU nor the CPU.
        RuntimeError: a CUDA graph is being captured, or no backend was right.
    """
    with on(device):
        head_sizes = {heads.q.shape[-1] for heads, _ in shapes}
        refused = {name: refusal(name, head_sizes, device, dtype) for name in BACKENDS if name != "eager"}
        candidates = {name: load_backend(name) for name, error in refused.items() if error is None}
        where = f"{name_device(device)}, {name_dtype(dtype)}"
        found = [(recall(where, heads, candidates, device, dtype), blocks) for heads, blocks in shapes]
    left_out = reasons({name: error for name, error in refused.items() if error is not None})
    for (_, wrong), _ in found:
        left_out = wrong | left_out
    right = [name for name in candidates if name not in left_out]
    if not right:
        raise RuntimeError(f"attention: fastest must be a backend that serves here, got {listed(left_out)}")
    total = {name: sum(blocks * times[name] for (times, _), blocks in found) for name in right}
    return AttentionChoice(pick(total), total, left_out, where)


def refusal(
    name: str, head_sizes: Collection[int], device: torch.device | None, dtype: torch.dtype | None
) -> Exception | None:
    """Why a backend does not serve for such heads, or None."""
    try:
        for head_size in head_sizes:
            check_backend(name, head_size, device, dtype)
    except (ImportError, RuntimeError, ValueError) as error:
        return error
    return None


def reasons(refused: Mapping[str, Exception]) -> dict[str, str]:
    return {name: str(error).removeprefix("attention: ") for name, error in refused.items()}


def listed(left_out: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in left_out.items())


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """A GPU as the current one, of whose stream no graph is being captured; or the CPU."""
    match device.type:
        case "cpu":
            yield
        case "cuda":
            with torch.cuda.device(device):
                if torch.cuda.is_current_stream_capturing():
                    rule = "chosen before a CUDA graph is captured"
                    raise RuntimeError(f"attention: fastest must be {rule}, got a capture that is under way")
                yield
        case other:
            raise ValueError(f"attention: fastest must be measured on cuda or cpu (choose sdpa), got {other}")


def name_device(device: torch.device) -> str:
    """By which devices that are equally fast are known."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} with {torch.get_num_threads()} threads"


def pick(milliseconds: Mapping[str, float]) -> str:
    """The fastest, or what is as good."""
    best = min(milliseconds, key=lambda name: milliseconds[name])
    return "sdpa" if milliseconds.get("sdpa", float("inf")) <= TIE * milliseconds[best] else best


def recall(
    where: str, heads: HeadShapes, candidates: Mapping[str, Attend], device: torch.device, dtype: torch.dtype
) -> Found:
    """What `measure` found, now or before."""
    key = where, heads, tuple(candidates.items())
    # Two threads that measure would slow each other.
    with LOCK:
        if key not in FOUND:
            FOUND[key] = measure(heads, candidates, device, dtype)
        return FOUND[key]


@torch.no_grad()
def measure(heads: HeadShapes, candidates: Mapping[str, Attend], device: torch.device, dtype: torch.dtype) -> Found:
    """Compare all candidates with the definition, and time those that are right."""
    with torch.autocast(device.type, enabled=False):
        q, k, v = heads.fill(device, dtype)
        # The first call at a shape, which may compile, is not timed.
        found = {name: discrepancy(attend, q, k, v) for name, attend in candidates.items()}
        right = [name for name, wrong in found.items() if wrong is None]
        clock = DeviceClock(device) if device.type == "cuda" else HostClock()
        times = take_turns([partial(candidates[name], q, k, v) for name in right], clock) if right else []
    return dict(zip(right, times, strict=True)), {name: wrong for name, wrong in found.items() if wrong is not None}


class HostClock:
    """Times calls that are over when they return."""

    def time(self, call: Callable[[], Any]) -> Callable[[], float]:
        """Run ``call``; what is returned tells its milliseconds."""
        start = perf_counter()
        call()
        elapsed = 1e3 * (perf_counter() - start)
        return lambda: elapsed

    def wait(self) -> None:
        """Nothing is under way."""


class DeviceClock(HostClock):
    """Times calls on a GPU, the current one."""

    def __init__(self, device: torch.device) -> None:
        size = max(FILLED, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        self.memory = torch.empty(size, dtype=torch.int8, device=device)

    def time(self, call: Callable[[], Any]) -> Callable[[], float]:
        """Run ``call`` with a cold L2; what is returned tells its milliseconds after `wait`."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # While the GPU is busy with this the host launches the call.
        self.memory.zero_()
        start.record()
        call()
        end.record()
        return lambda: start.elapsed_time(end)

    def wait(self) -> None:
        """Until all calls are over."""
        torch.cuda.current_stream().synchronize()


def take_turns(calls: Sequence[Callable[[], Any]], clock: HostClock) -> list[float]:
    """Median milliseconds of each call, one of each in turn, so that a busy machine slows all of them."""
    started = perf_counter()
    warmed, elapsed = 0, 0.0
    while warmed < MOST and elapsed < SECONDS / 4:
        for call in calls:
            clock.time(call)
        clock.wait()
        warmed, elapsed = warmed + 1, perf_counter() - started
    repeats = min(MOST, max(LEAST, int(SECONDS * warmed / elapsed)))
    reads = [[clock.time(call) for call in calls] for _ in range(repeats)]
    clock.wait()
    return [statistics.median(read() for read in column) for column in zip(*reads, strict=True)]
