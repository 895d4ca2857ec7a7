"""One case measured: every way is verified, those that are right are timed in turns, and held against a roof."""

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import MERV, Case, Setup, Way, referenced, tensors_of
from bench.clock import LEAST, capture, spread, take_turns
from bench.provenance import name_device
from bench.table import Row, split_name
from bench.verify import in_float64, in_other_memory, verify
from merv_fast.kernels._launch import Cost
from merv_fast.ops._native import native_fault

__all__ = ["Comparison", "Entry", "Roofs"]

SECONDS = {"cuda": 0.1, "cpu": 0.25}
"""About how long each way is warmed up, and then measured."""

COPIED = {"cuda": 1 << 30, "cpu": 1 << 27}
"""Bytes whose copy gives the bandwidth of a roof: more than any cache holds."""


class Entry(NamedTuple):
    """A case, and how it is measured.

    Args:
        case: what is compared.
        setup: where, and in which dtype.
        product: M, K, N of the matrix product whose rate is the roof of this case; None where a roof means nothing.
        graph: whether a GPU replays the calls as CUDA graphs, without the host's time.
        needs: packages that some ways need, by name of the way.
        native: whether its op needs the native kernels to be fit to measure.
        least: how often each way is run at least.
    """

    case: Case
    setup: Setup
    product: tuple[int, int, int] | None = None
    graph: bool = False
    needs: Mapping[str, Sequence[str]] = {}
    native: bool = False
    least: int = LEAST

    @property
    def names(self) -> tuple[str, str]:
        """``op`` and ``case`` of its rows."""
        return split_name(self.case.op, self.case.B)

    def obstacle(self, impl: str) -> str | None:
        """Why a way cannot be measured here, or None."""
        for package in self.needs.get(impl, ()):
            if find_spec(package) is None:
                return f"{package} is not installed"
        if self.native and (fault := native_fault(self.setup.device)):
            return f"native kernels for {self.setup.device}: {fault}"
        return None


class Comparison:
    """The ways of one case on the same arguments, which are made when they are first asked for."""

    def __init__(self, entry: Entry, roofs: "Roofs | None" = None) -> None:
        self.entry, self.roofs = entry, roofs
        self.ways = {way.name: way for way in entry.case.ways if entry.obstacle(way.name) is None}
        self.errors: dict[str, float | Exception] = {}
        self.times: dict[str, list[float]] = {}
        self.arguments: tuple | None = None

    @torch.no_grad()
    def make(self) -> tuple:
        """The arguments, which it keeps, and beside them the right result."""
        if self.arguments is None:
            case = self.entry.case
            torch.manual_seed(case.B)
            self.arguments = case.make()
            self.cost = case.cost(*self.arguments)
            self.wide = in_float64(self.arguments)
            self.exact = list(tensors_of(referenced(case.exact)(*self.wide)))
        return self.arguments

    @torch.no_grad()
    def verify(self, impl: str) -> float:
        """The error of a way, relative; raises what its call raises, and `WrongResult` beyond its budget."""
        if impl not in self.errors:
            arguments = self.make()
            try:
                way, dtype = self.ways[impl], self.entry.setup.dtype
                self.errors[impl] = verify(way, arguments, self.wide, self.exact, dtype)
            except Exception as error:
                self.errors[impl] = error
        found = self.errors[impl]
        if isinstance(found, Exception):
            raise found
        return found

    @torch.no_grad()
    def milliseconds(self, impl: str) -> list[float]:
        """Samples of one call; all ways that are right are timed together, in turns."""
        self.verify(impl)
        if not self.times:
            ready = self.ready()
            device, graph = self.entry.setup.device, self.entry.graph
            settings = {"graph": graph, "seconds": SECONDS[device], "least": self.entry.least}
            taken = take_turns(list(ready.values()), device, **settings) if ready else []
            self.times = dict(zip(ready, taken, strict=True))
            self.verify(impl)
        return self.times[impl]

    def ready(self) -> dict[str, list[Callable[[], Any]]]:
        """What to time of every way that is right; one that cannot be run again is right no more."""
        for impl in self.ways:
            # Whoever asks for its time is told.
            with suppress(Exception):
                self.verify(impl)
        # What is left of checking would only fill memory.
        self.wide, self.exact = (), []
        gc.collect()
        arguments = self.make()
        both, found = (arguments, in_other_memory(arguments)), {}
        capturing = self.entry.graph and self.entry.setup.device == "cuda"
        for impl, way in self.ways.items():
            if not isinstance(self.errors[impl], Exception):
                calls = [partial(way.call, *each) for each in both]
                try:
                    found[impl] = [capture(call) for call in calls] if capturing else calls
                    for run in found[impl]:
                        run()
                except Exception as error:
                    self.errors[impl] = error
                    found.pop(impl, None)
        return found

    def row(self, impl: str, about: Mapping[str, str]) -> Row:
        """What stands in the table for a way; ``about`` are versions, commit and date."""
        timing, setup, (op, case) = spread(self.milliseconds(impl)), self.entry.setup, self.entry.names
        roof = self.roofs.milliseconds(self.cost, self.entry) if self.roofs else None
        return Row(
            op=op,
            case=case,
            impl=impl,
            device=name_device(setup.device),
            dtype=str(setup.dtype).removeprefix("torch."),
            p20=timing.p20,
            p50=timing.p50,
            p80=timing.p80,
            flops=self.cost.flops or None,
            bytes=self.cost.bytes or None,
            percent_of_roof=roof and 100 * roof / timing.p50,
            error=self.verify(impl),
            versions=about["versions"],
            commit=about["commit"],
            date=about["date"],
        )


class Roofs:
    """What this device can do at best, measured when a case first asks: a copy, and a product of the case's shape."""

    def __init__(self) -> None:
        self.measured: dict[tuple, Comparison] = {}

    def milliseconds(self, cost: Cost, entry: Entry) -> float | None:
        """What a call must take: its operations at the product's rate, or its bytes at the copy's if that is longer."""
        if entry.product is None:
            return None
        copy, product = self.copy(entry.setup.device), self.product(entry.setup, entry.product)
        return max(share(cost.bytes, copy.cost.bytes, copy), share(cost.flops, product.cost.flops, product))

    def copy(self, device: str) -> Comparison:
        """Of more bytes than caches hold, read and written."""
        return self._measure(copy_entry(device))

    def product(self, setup: Setup, sizes: tuple[int, int, int]) -> Comparison:
        """PyTorch's matrix product, which is cuBLAS's on a GPU."""
        return self._measure(product_entry(setup, sizes))

    def _measure(self, entry: Entry) -> Comparison:
        key = *entry.names, entry.setup.device, entry.setup.dtype
        if key not in self.measured:
            self.measured[key] = comparison = Comparison(entry)
            comparison.milliseconds("PyTorch")
            # Only the times matter from here on.
            comparison.arguments = ()
        return self.measured[key]

    def rows(self, about: Mapping[str, str]) -> list[Row]:
        """Of all that were measured."""
        return [comparison.row("PyTorch", about) for comparison in self.measured.values()]


def share(part: int, whole: int, roof: Comparison) -> float:
    return part / whole * spread(roof.milliseconds("PyTorch")).p50


def copy_entry(device: str) -> Entry:
    size = COPIED[device]

    def make() -> tuple[Tensor, Tensor]:
        source = torch.rand(size // 8, dtype=torch.float64, device=device)
        return source, torch.empty_like(source)

    def call(source: Tensor, target: Tensor) -> Tensor:
        return target.copy_(source)

    def cost(source: Tensor, target: Tensor) -> Cost:
        return Cost(0, source.nbytes + target.nbytes)

    def exact(source: Tensor, target: Tensor) -> Tensor:
        return source

    case = Case(f"roof, copy of {size >> 20} MiB", 1, make, exact, [Way("PyTorch", call, [exact])], cost)
    return Entry(case, Setup(device, torch.float64, MERV), graph=True)


def product_entry(setup: Setup, sizes: tuple[int, int, int]) -> Entry:
    M, K, N = sizes

    def make() -> tuple[Tensor, Tensor]:
        return setup.rand(M, K), setup.rand(N, K, scale=K**-0.5)

    def low(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x.float(), w.float()).to(x.dtype)

    def cost(x: Tensor, w: Tensor) -> Cost:
        return Cost(2 * M * K * N, (M * K + K * N + M * N) * x.element_size())

    case = Case(f"roof, product {M}x{K}x{N}", 1, make, F.linear, [Way("PyTorch", F.linear, [low])], cost)
    return Entry(case, setup, graph=True)
