"""Several encoders at the same time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from merv_fast.runtime.streams import CUDA, Streams

__all__ = ["ConcurrentEncoders", "share_out"]


class ConcurrentEncoders:
    """Runs encoders side by side, each where its weights are; results are those of running one after another.

    On a GPU every lane is a stream: it begins when the caller's stream is done with what it has been given, and the
    caller's stream goes on when all lanes are done, also after an error, which reaches the caller. A lane whose weights
    lie on another GPU gets its input and gives back its output by a copy between the two, beside all other lanes. On a
    CPU encoders run one after another.

    With all on one GPU a call may be captured in a CUDA graph. Under ``torch.compile`` encoders run one after another.

    Args:
        encoders: E modules of one tensor; by name, or a sequence.
        lanes: streams on each GPU, at most one for each of its encoders; that many if not given. With fewer, small
            encoders share one beside a large one, by their costs.
        streams: what orders work on GPUs; for tests.

    Raises:
        ValueError: no encoders, or no lanes.

    Example:
        >>> import torch
        >>> encoders = ConcurrentEncoders([torch.nn.Linear(4, 2), torch.nn.Linear(4, 3)])
        >>> [tuple(y.shape) for y in encoders([torch.ones(5, 4), torch.ones(5, 4)])]
        [(5, 2), (5, 3)]
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module] | nn.ModuleDict | Sequence[nn.Module],
        *,
        lanes: int | None = None,
        streams: Streams = CUDA,
    ) -> None:
        if not len(encoders):
            raise ValueError("ConcurrentEncoders: encoders must be at least one, got none")
        if lanes is not None and lanes < 1:
            raise ValueError(f"ConcurrentEncoders: lanes must be at least 1, got {lanes}")
        self.encoders = encoders
        self.lanes = lanes
        self.costs: list[float] | None = None
        self._streams = streams

    def modules(self) -> list[nn.Module]:
        """The encoders, in order."""
        named = isinstance(self.encoders, (Mapping, nn.ModuleDict))
        return list(self.encoders.values() if named else self.encoders)  # type: ignore[union-attr, arg-type]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Any]:
        """The output of every encoder for its input, in their order.

        Args:
            inputs: E tensors.

        Returns:
            What the encoders return; tensors in it are on the device of the input.

        Raises:
            ValueError: not one input for each encoder.
        """
        modules = self.modules()
        if len(inputs) != len(modules):
            raise ValueError(f"ConcurrentEncoders: inputs must be {len(modules)}, one per encoder, got {len(inputs)}")
        devices = [device_of(module, x) for module, x in zip(modules, inputs, strict=True)]
        if torch.compiler.is_compiling() or not any(device.type == "cuda" for device in devices):
            pairs = zip(modules, inputs, devices, strict=True)
            return [moved(module(x.to(device)), x.device) for module, x, device in pairs]
        outputs: list[Any] = [None] * len(modules)
        streams, started = self._streams, []

        def fork(device: torch.device, number: int) -> Any:
            stream = streams.side(device, number)
            streams.wait(stream, streams.current(device))
            started.append((device, stream))
            return stream

        try:
            for position, (device, number, members) in enumerate(self.plan(devices)):
                lane = fork(device, number)
                # A copy between GPUs runs on the current stream of each, and makes each wait for the other: between the
                # lane and the caller's own stream, it would hold up all lanes after it.
                others = {inputs[member].device for member in members} - {device}
                gates = {gpu: fork(gpu, len(modules) + position) for gpu in others if gpu.type == "cuda"}
                own = self._run_lane([(modules[member], inputs[member]) for member in members], device, lane, gates)
                for member, output in zip(members, own, strict=True):
                    outputs[member] = output
            for member, device in enumerate(devices):
                if device.type != "cuda":
                    x = inputs[member]
                    outputs[member] = moved(modules[member](x.to(device)), x.device)
        finally:
            for device, stream in started:
                streams.wait(streams.current(device), stream)
        for member, (x, device) in enumerate(zip(inputs, devices, strict=True)):
            last = x.device if x.device.type == "cuda" else device
            if last.type == "cuda":
                keep = partial(kept, streams=streams, stream=streams.current(last))
                outputs[member] = moved(tree_map_only(Tensor, keep, outputs[member]), x.device)
        return outputs

    def _run_lane(
        self, calls: Sequence[tuple[nn.Module, Tensor]], device: torch.device, lane: Any, gates: dict[torch.device, Any]
    ) -> list[Any]:
        """Outputs of modules one after another, on the GPUs of their inputs, to which ``gates`` are the streams."""
        streams = self._streams

        def gate(gpu: torch.device) -> AbstractContextManager[Any]:
            return streams.use(gates[gpu]) if gpu in gates else nullcontext()

        with streams.use(lane):
            arrived, outputs = [], []
            for _, x in calls:
                with gate(x.device):
                    streams.keep(x, gates.get(x.device, lane))
                    arrived.append(x.to(device, non_blocking=True))
            for (module, x), here in zip(calls, arrived, strict=True):
                output = module(here)
                with gate(x.device):
                    # To a CPU it goes when all lanes have been given their work, for that waits.
                    outputs.append(moved(output, x.device) if x.device.type == "cuda" else output)
            return outputs

    def plan(self, devices: Sequence[torch.device]) -> list[tuple[torch.device, int, list[int]]]:
        """(GPU, lane, encoders in order) of every lane, those with most to do first."""
        costs = self.costs or [sum(p.numel() for p in module.parameters()) for module in self.modules()]
        lanes = []
        for device in sorted({device for device in devices if device.type == "cuda"}, key=str):
            members = [member for member, its in enumerate(devices) if its == device]
            groups = share_out([costs[member] for member in members], self.lanes or len(members))
            lanes += [(device, number, [members[place] for place in group]) for number, group in enumerate(groups)]
        return sorted(lanes, key=lambda lane: -sum(costs[member] for member in lane[2]))

    def measure(self, inputs: Sequence[Tensor], repeats: int = 3) -> list[float]:
        """Milliseconds of each encoder alone, by which lanes are planned from now on instead of by parameters.

        Args:
            inputs: as for a call.
            repeats: after one that is not counted; the median is taken.
        """
        costs = []
        for module, x in zip(self.modules(), inputs, strict=True):
            device = device_of(module, x)
            wait = partial(self._streams.synchronise, device) if device.type == "cuda" else lambda: None
            x, times = x.to(device), []
            for _ in range(repeats + 1):
                wait()
                started = time.perf_counter()
                module(x)
                wait()
                times.append(1e3 * (time.perf_counter() - started))
            costs.append(statistics.median(times[1:]))
        self.costs = costs
        return list(costs)


def share_out(costs: Sequence[float], groups: int) -> list[list[int]]:
    """Indices of ``costs`` in at most so many groups of about equal sums: the largest first, each to the least."""
    shares: list[list[int]] = [[] for _ in range(min(groups, len(costs)))]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        min(shares, key=lambda share: sum(costs[i] for i in share)).append(index)
    return shares


def device_of(module: nn.Module, x: Tensor) -> torch.device:
    """Where a module's weights are; where ``x`` is, if it has none, or if they come there only while they are used."""
    own = next((tensor.device for tensors in (module.parameters(), module.buffers()) for tensor in tensors), x.device)
    return x.device if own.type == "meta" else own


def moved(output: Any, device: torch.device) -> Any:
    """``output`` with its tensors on ``device``."""
    return tree_map_only(Tensor, lambda y: y.to(device, non_blocking=device.type == "cuda"), output)


def kept(tensor: Tensor, streams: Streams, stream: Any) -> Tensor:
    """``tensor``, whose memory ``stream`` needs as well."""
    streams.keep(tensor, stream)
    return tensor
