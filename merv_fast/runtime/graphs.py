"""A call of many kernels, captured once for each shape of its inputs as a CUDA graph, then replayed by one launch."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from threading import RLock
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from merv_fast.remembered import Constants
from merv_fast.runtime.concurrent import kept
from merv_fast.runtime.parts import Parts
from merv_fast.runtime.streams import Streams, _CudaStreams

__all__ = ["CUDA_GRAPHS", "GraphPool", "GraphedCall", "Graphs"]

logger = logging.getLogger("merv_fast")

REPLAYS = -1
"""Number of the stream on which graphs are captured and replayed; encoders have those from 0 on."""

WARM_UPS = 2
"""Calls before a capture: they compile kernels and make handles and workspaces, which a capture may not."""

REFUSALS = 64
"""Shapes without a graph of which is remembered why, and when they came."""

RETRY = 32
"""Calls after which a shape is captured after all for which there was no memory."""

_ONE_AT_A_TIME = RLock()
"""CUDA captures one graph at a time, and what another thread gives to a stream meanwhile would become part of it."""


class Graphs(Streams, Protocol):
    """CUDA graphs. Streams at the side are for them alone: work from elsewhere would be drawn into a capture."""

    def serves(self, device: torch.device) -> bool:
        """Whether there are graphs on ``device``."""

    def capturing(self) -> bool:
        """Whether the active stream is being captured."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """The active stream copies ``source`` into ``target``."""

    def trim(self) -> None:
        """Give back memory that PyTorch only keeps for later: captures cannot have it."""

    def pool(self) -> Any:
        """A name for memory that several graphs may share."""

    def capture(self, call: Callable[[], Any], pool: Any) -> tuple[Any, Any]:
        """A graph of what ``call`` gives to the active stream, and its outputs, which hold nothing before a replay."""

    def replay(self, graph: Any) -> None:
        """The active stream does what was captured."""

    def release(self, graph: Any) -> None:
        """``graph``, of which no replay is under way, is not needed any more."""

    def reserved(self, device: torch.device) -> int:
        """Bytes of ``device`` that PyTorch holds."""


class _CudaGraphs(_CudaStreams):
    """PyTorch's."""

    # PyTorch deals out the same 32 streams again and again, so another's may be one of these; few ask for a priority.
    @cache  # noqa: B019
    def side(self, device: torch.device, number: int) -> torch.cuda.Stream:
        return torch.cuda.Stream(device, priority=-1)

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def capturing(self) -> bool:
        return torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing()

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def trim(self) -> None:
        torch.cuda.empty_cache()

    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def capture(self, call: Callable[[], Any], pool: Any) -> tuple[Any, Any]:
        # `torch.cuda.graph` leaves its stream the active one if a capture fails.
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            outputs = call()
        except BaseException:
            # What the call raised tells more than that the capture has failed with it.
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
        return graph, outputs

    def replay(self, graph: Any) -> None:
        graph.replay()

    def release(self, graph: Any) -> None:
        graph.reset()

    def reserved(self, device: torch.device) -> int:
        return torch.cuda.memory_reserved(device)


CUDA_GRAPHS: Graphs = _CudaGraphs()


class GraphPool:
    """Memory that the graphs of one or more `GraphedCall` share; they are replayed one after another, on one stream.

    Memory of a graph that is dropped serves those captured later; all of it is given back when no graph is left.

    Args:
        max_bytes: of all graphs and their buffers; when there are more, all are dropped. None for no bound.
        graphs: what captures and replays; for tests.

    Attributes:
        reserved: bytes that captures took from the GPU.
        now: how many calls there were.
    """

    def __init__(self, max_bytes: int | None = None, graphs: Graphs = CUDA_GRAPHS) -> None:
        self.max_bytes, self.graphs = max_bytes, graphs
        self.calls: list[GraphedCall] = []
        self.reserved = self._live = self.now = 0
        self._handle: Any = None

    @property
    def bytes(self) -> int:
        """Of all graphs and their buffers."""
        return self.reserved + sum(bucket.buffer_bytes for call in self.calls for bucket in call.buckets)

    def capture(self, call: Callable[[], Any], device: torch.device) -> tuple[Any, Any, int]:
        """The graph of ``call``, its outputs, and by how many bytes the memory has grown."""
        if not self._live:
            # PyTorch does not take the name of a pool again whose graphs are all gone.
            self._handle, self.reserved = self.graphs.pool(), 0
        # Before it is counted: else what is given back would hide what is taken.
        self.graphs.trim()
        before = self.graphs.reserved(device)
        graph, outputs = self.graphs.capture(call, self._handle)
        grown = max(0, self.graphs.reserved(device) - before)
        self._live, self.reserved = self._live + 1, self.reserved + grown
        return graph, outputs, grown

    def release(self, graph: Any) -> None:
        """Drop a graph of which no replay is under way."""
        self.graphs.release(graph)
        self._live -= 1
        if not self._live:
            self.reserved = 0

    def clear(self) -> None:
        """Drop all graphs."""
        for call in self.calls:
            call.clear()


@dataclass
class Bucket:
    """The graph for inputs of one shape: it reads ``buffers`` and writes ``outputs``.

    Attributes:
        shapes: of the inputs.
        buffer_bytes: of ``buffers``.
        grown: bytes by which PyTorch's memory grew with the capture: less, if there was room in what graphs share.
        constants: what the graph reads of what was computed from weights before.
        replays: how many there were.
        used: when the last one was, in calls of the pool.
    """

    graph: Any
    buffers: list[Tensor]
    outputs: Any
    shapes: list[list[int]]
    buffer_bytes: int
    grown: int
    constants: Constants
    replays: int = 0
    used: int = 0

    def __str__(self) -> str:
        return f"{self.shapes[0]} {(self.buffer_bytes + self.grown) / 2**20:.0f} MiB, {self.replays} replays"


class Refusal(NamedTuple):
    """Why a call is not captured, and whether it will be so for all that is known."""

    reason: str
    lasting: bool = True


class GraphedCall:
    """``call``, but each shape of inputs is captured when it first comes, and then replayed: the same kernels.

    Outputs are the caller's: they are copied out, so that no later call writes to them. Weights are read where they
    are: a replay sees what an optimiser wrote to them. When one is somewhere else than before, or the module has other
    parts, another mode or another attention, all graphs are dropped and shapes are captured anew; so is a graph that
    reads what was computed before from weights alone, once those are written to. Of hooks, and of what else Python
    does in ``call``, a replay knows nothing.

    What cannot be captured is found out when the object is made, and by `try_out`; ``obstacle`` says why. Otherwise
    ``call`` runs plainly, which is counted and, at the first time, logged, only

    - while gradients are enabled, another graph is captured, or ``torch.compile`` traces (which is not counted),
    - for inputs that are on another device than the weights, or empty,
    - for a shape whose capture failed, or that takes more than ``pool.max_bytes``,
    - for a shape for which there is no room, unless it comes twice while what would make room is not used.

    Threads may call it at once; replays happen one after another.

    Args:
        call: from a list of tensors to tensors, however nested. It must read no tensors but those and the module's.
        module: whose weights and settings it uses.
        plain: what runs where no graph does, in the streams of the caller; ``call`` if not given.
        max_graphs: shapes that are kept; the least recently used one is dropped for another that comes more often.
        pool: memory to share with other calls.
        graphs: what captures and replays, if no ``pool`` is given; for tests.

    Attributes:
        obstacle: why nothing is captured, or None.
        plain_calls: how often ``plain`` ran, by reason.

    Raises:
        ValueError: ``max_graphs`` is not positive.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.

    Example:
        >>> layer = torch.nn.Linear(4, 2).eval()
        >>> graphed = GraphedCall(lambda inputs: layer(inputs[0]), layer)
        >>> with torch.inference_mode():
        ...     graphed([torch.ones(3, 4)]).shape
        torch.Size([3, 2])
        >>> graphed.obstacle
        'weights are on cpu, which has no CUDA graphs'
    """

    def __init__(
        self,
        call: Callable[[list[Tensor]], Any],
        module: nn.Module,
        *,
        plain: Callable[[list[Tensor]], Any] | None = None,
        max_graphs: int = 4,
        pool: GraphPool | None = None,
        graphs: Graphs = CUDA_GRAPHS,
    ) -> None:
        if max_graphs < 1:
            raise ValueError(f"GraphedCall: max_graphs must be at least 1, got {max_graphs}")
        self.call, self.module, self.plain = call, module, plain or call
        self.max_graphs = max_graphs
        self.pool = GraphPool(graphs=graphs) if pool is None else pool
        self.graphs = self.pool.graphs
        self.pool.calls.append(self)
        self.plain_calls: Counter[str] = Counter()
        self._buckets: OrderedDict[Hashable, Bucket] = OrderedDict()
        self._refused: OrderedDict[Hashable, tuple[Refusal, int]] = OrderedDict()
        self._crowded: OrderedDict[Hashable, None] = OrderedDict()
        self._came: OrderedDict[Hashable, int] = OrderedDict()
        self.obstacle: str | None = None
        self._decide()

    @property
    def buckets(self) -> list[Bucket]:
        """The graphs, the least recently used one first."""
        return list(self._buckets.values())

    def __str__(self) -> str:
        if self.obstacle is not None:
            return f"no graphs: {self.obstacle}"
        parts = [f"{len(self._buckets)} of at most {self.max_graphs} graphs", *map(str, self.buckets)]
        return "; ".join([*parts, *(f"{count} plain: {reason}" for reason, count in self.plain_calls.items())])

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        """What ``call`` gives for ``inputs``.

        Raises:
            whatever ``call`` does; an error while a shape is captured is logged, and ``call`` runs plainly.
        """
        if torch.compiler.is_compiling():
            return self.plain(list(inputs))
        reason = "gradients are enabled" if torch.is_grad_enabled() else None
        if reason is None and self.graphs.capturing():
            reason = "another graph is captured"
        if reason is None:
            with _ONE_AT_A_TIME:
                bucket = self._bucket(inputs)
                if isinstance(bucket, Bucket):
                    return self._replay(bucket, inputs)
                reason = bucket.reason
        if not self.plain_calls[reason]:
            logger.warning("a call runs without a CUDA graph: %s", reason)
        self.plain_calls[reason] += 1
        return self.plain(list(inputs))

    def try_out(self, inputs: Sequence[Tensor]) -> None:
        """Capture for inputs such as these; if that fails, ``obstacle`` says why until the module changes."""
        with _ONE_AT_A_TIME, torch.no_grad():
            bucket: Bucket | Refusal
            try:
                bucket = self._bucket(inputs)
            except torch.OutOfMemoryError as error:
                bucket = Refusal(first_line(error), lasting=False)
            except Exception as error:  # whatever the call raises
                bucket = Refusal(first_line(error))
            if isinstance(bucket, Bucket) or self.obstacle is not None:
                return
            if bucket.lasting:
                self.clear()
                self.obstacle = bucket.reason
            else:
                logger.warning("a CUDA graph could not be tried out: %s", bucket.reason)

    def check(self) -> None:
        """Take the module as it is now, if it is not as it was; ``obstacle`` and ``buckets`` are then what holds."""
        with _ONE_AT_A_TIME:
            if self._parts.state() != self._state:
                self._decide()

    def clear(self) -> None:
        """Drop all graphs; shapes that come again are captured again."""
        with _ONE_AT_A_TIME:
            for key in list(self._buckets):
                self._drop(key)

    def _decide(self) -> None:
        """Take the module as it is now."""
        self.clear()
        for remembered in (self._refused, self._crowded, self._came):
            remembered.clear()
        self._parts = Parts(self.module)
        self._state = self._parts.state()
        self.obstacle = self._parts.obstacle(self.graphs.serves)
        self._device = self._parts.device

    def _bucket(self, inputs: Sequence[Tensor]) -> Bucket | Refusal:
        """The graph for such inputs; or why there is none."""
        self.check()
        if self.obstacle is not None:
            return Refusal(self.obstacle)
        if any(x.device != self._device or not x.numel() for x in inputs):
            return Refusal(f"inputs must not be empty, and on {self._device}")
        key = (tuple((x.shape, x.stride(), x.dtype) for x in inputs), settings(self._device))
        self.pool.now += 1
        if key in self._buckets and not self._buckets[key].constants.hold():
            self._drop(key)
        if key not in self._buckets:
            return self._refusal(key) or self._add(key, inputs)
        self._buckets.move_to_end(key)
        self._buckets[key].used = self.pool.now
        return self._buckets[key]

    def _refusal(self, key: Hashable) -> Refusal | None:
        """Why a shape without a graph is not to be captured now, or None."""
        last = self._came.get(key)
        remember(self._came, key, self.pool.now)
        if key in self._refused:
            refusal, calls = self._refused[key]
            if refusal.lasting or calls:
                self._refused[key] = refusal, calls - 1
                return refusal
            del self._refused[key]
        rivals = list(self._buckets.values())[:1] if len(self._buckets) >= self.max_graphs else []
        if key in self._crowded:
            rivals = [bucket for call in self.pool.calls for bucket in call.buckets]
        if rivals and (last is None or any(bucket.used > last for bucket in rivals)):
            return Refusal("there is no room beside graphs of shapes that come more often", lasting=False)
        return None

    def _add(self, key: Hashable, inputs: Sequence[Tensor]) -> Bucket | Refusal:
        while len(self._buckets) >= self.max_graphs:
            self._drop(next(iter(self._buckets)))
        bucket = self._capture(inputs)
        if isinstance(bucket, Refusal):
            remember(self._refused, key, (bucket, RETRY))
            return bucket
        bucket.used = self.pool.now
        self._buckets[key] = bucket
        if self.pool.max_bytes is None or self.pool.bytes <= self.pool.max_bytes:
            return bucket
        alone, taken = sum(len(call.buckets) for call in self.pool.calls) == 1, self.pool.bytes
        # Of what graphs share nothing is given back before the last of them is gone.
        self.pool.clear()
        reason = f"graphs take {taken / 2**20:.0f} MiB, max_bytes is {self.pool.max_bytes / 2**20:.0f} MiB"
        if alone:
            remember(self._refused, key, (Refusal(reason), 0))
            return Refusal(reason)
        remember(self._crowded, key, None)
        return Refusal(f"{reason}: all were dropped", lasting=False)

    def _capture(self, inputs: Sequence[Tensor]) -> Bucket | Refusal:
        graphs, device = self.graphs, self._device
        caller, side = graphs.current(device), graphs.side(device, REPLAYS)
        autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        constants = Constants()
        # Tensors of inference mode could not be written to outside of it. Autocast's cache would free what it cast.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, autocast[1], autocast[0], cache_enabled=False),
            constants,
        ):
            try:
                with graphs.use(side):
                    buffers = [like(x) for x in inputs]
                self._copy_in(buffers, inputs, caller, side)
                with graphs.use(side):
                    for _ in range(WARM_UPS):
                        self.call(list(buffers))
                    graphs.synchronise(device)
                    try:
                        graph, outputs, grown = self.pool.capture(lambda: self.call(list(buffers)), device)
                    except Exception as error:  # whatever a module or CUDA raises
                        lasting = not isinstance(error, torch.OutOfMemoryError)
                        return Refusal(f"capture failed: {first_line(error)}", lasting)
            finally:
                graphs.wait(caller, side)
        taken = sum(x.untyped_storage().nbytes() for x in buffers)
        return Bucket(graph, buffers, outputs, [list(x.shape) for x in inputs], taken, grown, constants)

    def _replay(self, bucket: Bucket, inputs: Sequence[Tensor]) -> Any:
        graphs = self.graphs
        caller, side = graphs.current(self._device), graphs.side(self._device, REPLAYS)
        try:
            self._copy_in(bucket.buffers, inputs, caller, side)
            with graphs.use(side):
                graphs.replay(bucket.graph)
                outputs = tree_map_only(Tensor, self._copied, bucket.outputs)
        finally:
            graphs.wait(caller, side)
        bucket.replays += 1
        return tree_map_only(Tensor, lambda y: kept(y, graphs, caller), outputs)

    def _copy_in(self, buffers: Sequence[Tensor], inputs: Sequence[Tensor], caller: Any, side: Any) -> None:
        self.graphs.wait(side, caller)
        with self.graphs.use(side):
            for buffer, x in zip(buffers, inputs, strict=True):
                self.graphs.keep(x, side)
                self.graphs.copy(buffer, x)

    def _copied(self, y: Tensor) -> Tensor:
        out = like(y)
        self.graphs.copy(out, y)
        return out

    def _drop(self, key: Hashable) -> None:
        # A replay may be under way.
        with self.graphs.use(self.graphs.side(self._device, REPLAYS)):
            self.graphs.synchronise(self._device)
        self.pool.release(self._buckets.pop(key).graph)


def remember(held: OrderedDict[Hashable, Any], key: Hashable, value: Any) -> None:
    """``held[key] = value``; of more than `REFUSALS` keys the oldest are forgotten."""
    held[key] = value
    held.move_to_end(key)
    while len(held) > REFUSALS:
        held.popitem(last=False)


def like(x: Tensor) -> Tensor:
    """Memory for a copy of ``x``, strides included, by which kernels are chosen."""
    if 0 in x.stride():
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def settings(device: torch.device) -> tuple[Hashable, ...]:
    """PyTorch's settings by which a call on ``device`` chooses its kernels."""
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    backends: Any = torch.backends  # whose submodules are made at run time
    matmul, cudnn = backends.cuda.matmul, backends.cudnn
    return (
        autocast,
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        cudnn.conv.fp32_precision,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        backends.cuda.flash_sdp_enabled(),
        backends.cuda.mem_efficient_sdp_enabled(),
        backends.cuda.math_sdp_enabled(),
        backends.cuda.cudnn_sdp_enabled(),
    )


def first_line(error: BaseException) -> str:
    """The first line of what went wrong first."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
