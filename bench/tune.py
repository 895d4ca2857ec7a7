"""Choose launches by measuring them: ``python -m bench.tune [TABLE ...] [--write] [--seconds N]``.

For each table of launch choices, candidates run MERV's shapes on this GPU with a cold L2; one that does not compile,
does not fit or is wrong is left out. With --write the best one replaces the choice of this architecture in the
kernel's source. Processes beside this one compile the candidates first.
"""

import argparse
import ast
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table as Printed
from torch import Tensor

from bench import cases as catalogue
from bench.cases import MERV, OURS, Case, Setup, Way
from bench.clock import measure
from bench.kernels import Run, copy_bandwidth, describe, error_of, examine
from bench.verify import in_float64, in_other_memory
from merv_fast.kernels import _blend, _gemm, _outer, _scoring
from merv_fast.kernels import fuse_encoders as fuse_kernels
from merv_fast.kernels import pool_tokens as pool_kernels
from merv_fast.kernels import temporal_attention as temporal_kernels
from merv_fast.kernels._launch import Cost, capability
from merv_fast.ops import _tail_passes

KERNELS = Path(pool_kernels.__file__).parent
GAIN = 1.02
"""How much faster than the present choice another must be, as two measurements of one differ by about that."""


class Table(NamedTuple):
    """A table of launch choices: where it stands, what might stand in it, and what decides.

    Candidates are the fields of a launch from ``first`` on; the others stay as they are.
    """

    module: Any
    variable: str
    entry: str | None
    candidates: Sequence[tuple]
    cases: Callable[[str], Iterator[Case]]
    first: int = 0

    def choices(self, architecture: int) -> dict:
        """The dictionary that holds the choice, under ``key``."""
        choices = getattr(self.module, self.variable)
        return choices if self.entry is None else choices[architecture]

    def key(self, architecture: int) -> Any:
        return architecture if self.entry is None else self.entry

    def tried(self, architecture: int) -> list[tuple]:
        """The present choice, and what it is with each candidate in it."""
        present = self.choices(architecture)[self.key(architecture)]
        found = [tuple(present)]
        for candidate in self.candidates:
            fields = present._fields[self.first : self.first + len(candidate)]
            choice = present._replace(**dict(zip(fields, candidate, strict=True)))
            if architecture >= 90 or not getattr(choice, "dependent", False):
                found.append(tuple(choice))
        return list(dict.fromkeys(found))


def grid(*sides: Sequence[int], threads: tuple[int, int]) -> list[tuple]:
    """All combinations of two sides and warps that give a thread so many elements of their product."""
    least, most = threads
    return [c for c in product(*sides) if least <= c[0] * c[1] // (32 * c[2]) <= most]


SIDES = (8, 16, 32, 64, 128)
LARGE = [(128, 256, 64, 8, s) for s in (3, 4)] + [(256, 128, 64, 8, s) for s in (3, 4)]
LARGE += [(128, 128, 64, w, s) for w in (4, 8) for s in (3, 4, 5)] + [(128, 128, 128, 8, s) for s in (2, 3)]
LARGE += [(64, 256, 64, w, s) for w in (4, 8) for s in (3, 4)] + [(128, 256, 128, 8, 2)]
NARROW = [(64, 128, 64, 4, s) for s in (3, 4, 5)] + [(64, 64, 64, 4, s) for s in (3, 4, 5)]
NARROW += [(128, 64, 64, w, s) for w in (4, 8) for s in (3, 4)] + [(64, 128, 128, 4, 3), (64, 64, 128, 4, 4)]
SINGLE = [(64, 64, 32, 4, s) for s in (2, 3, 4)] + [(32, 64, 32, 4, 3), (64, 128, 32, 8, 3), (128, 64, 32, 8, 3)]
SINGLE += [(128, 128, 32, 8, 2), (64, 64, 16, 4, 4), (128, 128, 16, 8, 3)]
COLUMNS = [(depth, *c) for depth in (1, 2, 4) for c in grid((64, 128, 256), SIDES[1:4], (4, 8), threads=(4, 64))]
SCHEDULES = list(product((False, True), repeat=2))
SCHEDULE = _gemm.Launch._fields.index("persistent")
"""What may follow a GEMM's tile: whether it is persistent, and dependent; and where."""


def setup_on(device: str, dtype: torch.dtype = torch.bfloat16, **shapes: Any) -> Setup:
    return Setup(device, dtype, MERV._replace(**shapes))


def pooling(device: str) -> Iterator[Case]:
    for B in (1, 8):
        yield catalogue.pooling_case(setup_on(device), B)


def weighed(device: str) -> Iterator[Case]:
    for B in (1, 8):
        yield catalogue.weighed_gemm_case(setup_on(device), B)


def weighed_small(device: str) -> Iterator[Case]:
    """A narrower language model, and fewer tokens."""
    yield catalogue.weighed_gemm_case(setup_on(device, D=2048), 1)
    yield catalogue.weighed_gemm_case(setup_on(device, out_grid=(4, 4)), 1)


def chained(device: str) -> Iterator[Case]:
    """The pooling and the GEMM that waits for it, as how one is launched changes what the other takes."""
    for B in (1, 8):
        yield catalogue.chain_case(setup_on(device), B)


def chained_small(device: str) -> Iterator[Case]:
    yield catalogue.chain_case(setup_on(device, D=2048), 1)
    yield catalogue.chain_case(setup_on(device, out_grid=(4, 4)), 1)


def chained_hidden(device: str) -> Iterator[Case]:
    for B in (1, 8):
        yield catalogue.chain_case(setup_on(device), B, hidden=True)


def weighed_float32(device: str) -> Iterator[Case]:
    yield catalogue.weighed_gemm_case(setup_on(device, torch.float32), 1)


def hidden(device: str) -> Iterator[Case]:
    """The hidden layer of an MLP projector, with scores."""
    setup = setup_on(device)
    C, D, S = MERV.widths[0], MERV.D, MERV.S

    def call(x: Tensor, w: Tensor, bias: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        sums = torch.empty(len(x), _gemm.score_chunks(len(x), S, D, x.dtype), dtype=torch.float32, device=x.device)
        return _gemm.project(x, w, bias, True, (vector, sums)), sums

    def shown(result: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [result[0], result[1].sum(1)]

    def plainly(x: Tensor, w: Tensor, bias: Tensor, vector: Tensor) -> list[Tensor]:
        out = torch.nn.functional.gelu(torch.nn.functional.linear(x, w, bias))
        return [out, (out.to(vector.dtype) @ vector).sum(1)]

    def cost(x: Tensor, w: Tensor, *rest: Tensor) -> Cost:
        rows = x.shape[0] * x.shape[1]
        return Cost(2 * rows * w.numel(), (x.numel() + w.numel() + rows * D) * x.element_size())

    for B in (1, 8):

        def make(B: int = B) -> tuple:
            w, bias = setup.rand(D, C, scale=C**-0.5), setup.rand(D)
            return setup.rand(B, S, C), w, bias, torch.randn(D, device=device)

        yield Case("hidden layer", B, make, plainly, [Way(OURS, call, [plainly], shown)], cost)


def fusing(device: str) -> Iterator[Case]:
    for case in catalogue.fuse_cases(setup_on(device, batches=(1, 8), compiled=())):
        if case.op == "fuse_encoders":
            reference = catalogue.REFERENCES["fuse_encoders"]
            yield case._replace(exact=reference, ways=[Way(OURS, fuse_kernels.launch, [reference])])


def attending(device: str) -> Iterator[Case]:
    """Forward and backward."""
    how = MERV.heads, MERV.window
    for case in catalogue.temporal_cases(setup_on(device, batches=(1, 8), compiled=())):
        if case.op == catalogue.TEMPORAL:

            def forward(qkv: Tensor, *rest: Tensor, call: Callable) -> Tensor:
                return call(qkv, *how)

            calls = temporal_kernels.launch, catalogue.REFERENCES["temporal_attention"]
        elif case.op == "temporal_attention_backward":

            def forward(qkv: Tensor, stream: Tensor, *rest: Tensor, call: Callable) -> Tensor:
                return call(stream, qkv, *how)

            calls = temporal_kernels.launch_backward, catalogue.REFERENCES["temporal_attention_backward"]
        else:
            continue
        ours, reference = (partial(forward, call=call) for call in calls)
        yield case._replace(exact=reference, ways=[Way(OURS, ours, [reference])])


def scoring(device: str) -> Iterator[Case]:
    case = catalogue.scoring_case(setup_on(device))
    yield case._replace(ways=case.ways[:1])


def passes(device: str, which: str) -> Iterator[Case]:
    """`dots` or `blend` in the backward of MERV's collapsed tail."""
    setup = setup_on(device)

    def dots(call: Callable, w: Tensor, ds: Tensor, grads: list, values: list, vectors: list) -> Any:
        return call(grads, values)

    def blend(call: Callable, w: Tensor, ds: Tensor, grads: list, values: list, vectors: list) -> Any:
        outs = [torch.empty_like(x) for x in grads], [torch.empty_like(x) for x in values]
        more = {"values": values, "weighed": outs[1]}
        call(w, grads=grads, ds=ds, vectors=vectors, dvalues=outs[0], **more)
        return outs

    def cost(w: Tensor, ds: Tensor, grads: list, values: list, vectors: list) -> Cost:
        numbers = sum(x.numel() for x in (*grads, *values))
        return Cost(2 * numbers, (1 if which == "dots" else 2) * numbers * grads[0].element_size())

    for B in (1, 8):

        def make(B: int = B) -> tuple:
            w, ds = (torch.randn(B, len(MERV.widths), device=device) for _ in range(2))
            grads, values = ([setup.rand(B, MERV.S, C) for C in MERV.widths] for _ in range(2))
            return w, ds, grads, values, [torch.randn(C, device=device) for C in MERV.widths]

        run = dots if which == "dots" else blend
        ours, plainly = (partial(run, getattr(place, which)) for place in (_blend, _tail_passes))
        yield Case(which, B, make, plainly, [Way(OURS, ours, [plainly])], cost)


def outer(device: str) -> Iterator[Case]:
    """`add_outer` to copies of the gradients, in the backward of MERV's collapsed tail."""
    setup = setup_on(device)

    def add(call: Callable, grads: list, weights: list, query: Tensor, means: list) -> Any:
        copies = [grad.clone() for grad in grads]
        return [*copies, call(copies, weights, query, means)]

    def cost(grads: list, *rest: Any) -> Cost:
        numbers = sum(grad.numel() for grad in grads)
        return Cost(4 * numbers, 5 * numbers * grads[0].element_size())

    def make() -> tuple:
        grads, weights = ([setup.rand(MERV.D, C) for C in MERV.widths] for _ in range(2))
        return grads, weights, setup.rand(MERV.D), [torch.randn(C, device=device) for C in MERV.widths]

    ours, plainly = (partial(add, place.add_outer) for place in (_outer, _tail_passes))
    yield Case("outer", 1, make, plainly, [Way(OURS, ours, [plainly])], cost)


TABLES = {
    "gemm-large": Table(_gemm, "LAUNCHES", "large", LARGE, weighed),
    "pool_tokens": Table(pool_kernels, "LAUNCHES", None, grid(SIDES[:4], (128, 256), (4, 8), threads=(4, 32)), pooling),
    "gemm-large-schedule": Table(_gemm, "LAUNCHES", "large", SCHEDULES, chained, SCHEDULE),
    "temporal_attention": Table(
        temporal_kernels, "LAUNCHES", None, list(product((4, 8, 16), (4, 8), (1, 2, 4, 8))), attending
    ),
    "gemm-gelu": Table(_gemm, "LAUNCHES", "gelu", [*LARGE, *NARROW], hidden),
    "gemm-gelu-schedule": Table(_gemm, "LAUNCHES", "gelu", SCHEDULES, chained_hidden, SCHEDULE),
    "gemm-small": Table(_gemm, "LAUNCHES", "small", [*NARROW, *LARGE], weighed_small),
    "gemm-small-schedule": Table(_gemm, "LAUNCHES", "small", SCHEDULES, chained_small, SCHEDULE),
    "fuse-sum": Table(fuse_kernels, "SUM", None, grid(SIDES[:3], (128, 256, 512), (4, 8), threads=(4, 16)), fusing),
    "fuse-scores": Table(
        fuse_kernels, "SCORES", None, grid(SIDES[2:], (64, 128, 256), (4, 8), threads=(8, 128)), fusing
    ),
    "dots": Table(
        _blend, "DOTS", None, grid(SIDES[1:], (128, 256), (4, 8), threads=(8, 64)), partial(passes, which="dots")
    ),
    "blend": Table(
        _blend, "BLEND", None, grid(SIDES[:4], (128, 256), (4, 8), threads=(8, 64)), partial(passes, which="blend")
    ),
    "scoring": Table(_scoring, "LAUNCHES", None, COLUMNS, scoring),
    "outer": Table(_outer, "LAUNCHES", None, grid(SIDES[:3], (128, 256, 512), (4, 8), threads=(4, 32)), outer),
    "gemm-float32": Table(_gemm, "LAUNCHES", "float32", SINGLE, weighed_float32),
}
"""In the order of what matters most; what a table is found to be best with holds for those after it."""


@contextmanager
def chosen(table: Table, architecture: int, choice: tuple) -> Iterator[None]:
    """While it lasts, the kernel launches with ``choice``; a GEMM whatever its shape, if it has the epilogue."""
    choices, key, choose = table.choices(architecture), table.key(architecture), _gemm.choose
    before = choices[key]
    choices[key] = table.module.Launch(*choice)
    if table.module is _gemm:

        def chosen_here(B: int, S: int, N: int, dtype: torch.dtype, gelu: bool) -> _gemm.Launch:
            return choices[key] if gelu == (key == "gelu") else choose(B, S, N, dtype, gelu)

        _gemm.choose = chosen_here
    try:
        yield
    finally:
        choices[key], _gemm.choose = before, choose


def tune(run: Run, name: str, seconds: float) -> tuple | None:
    """The best choice for a table on this GPU, or None where the present one is; prints what was measured.

    Kernels launch with it from then on.
    """
    table, architecture = TABLES[name], capability()
    present, *others = table.tried(architecture)
    prepared = []
    with torch.no_grad():
        for case in table.cases(run.setup.device):
            torch.manual_seed(case.B)
            arguments = case.make()
            wide = in_float64(arguments)
            exact = list(catalogue.tensors_of(catalogue.referenced(case.exact)(*wide)))
            prepared.append((case, arguments, in_other_memory(arguments), wide, exact))
        started, found, left_out = time.monotonic(), {}, 0
        printed = Printed(
            "choice", *(f"{case.op.strip()}, B={case.B}: us, % of roof" for case, *_ in prepared), title=name
        )
        for choice in (present, *others):
            if found and time.monotonic() - started > seconds:
                left_out += 1
                continue
            with chosen(table, architecture, choice):
                times, shown = [], []
                for case, arguments, others, wide, exact in prepared:
                    (way,) = case.ways
                    try:
                        error_of(run, way, arguments, wide, exact)
                        calls = [partial(way.call, *each) for each in (arguments, others)]
                        times.append(measure(calls, run.setup.device, graph=True, seconds=0.05).p50)
                    except Exception as error:
                        shown.append(describe(error)[:60])
                        break
                    roof = run.roof(case.cost(*arguments), case.B)
                    shown.append(f"{1e3 * times[-1]:.1f}, {100 * roof / times[-1]:.0f}" if roof else "")
                if len(times) == len(prepared):
                    found[choice] = math.prod(times) ** (1 / len(times))
            printed.add_row(str(choice) + (" present" if choice == present else ""), *shown)
    Console(width=None if sys.stdout.isatty() else 140).print(printed)
    if left_out:
        print(f"{name}: no time for {left_out} candidates")
    if not found:
        return None
    best = min(found, key=found.__getitem__)
    gain = found[present] / found[best] if present in found else math.inf
    print(f"{name}: best {best}, {gain:.2f} times as fast as {present}", flush=True)
    if gain < GAIN:
        return None
    table.choices(architecture)[table.key(architecture)] = table.module.Launch(*best)
    return best


def rewrite(source: str, variable: str, architecture: int, entry: str | None, choice: Any) -> str:
    """``source`` with ``choice``, a launch, in the place of one launch choice of the dictionary ``variable``.

    What has a default is written by its name, and only where it differs.

    Raises:
        ValueError: there is no such entry.
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == [variable]:
            place: ast.expr | None = node.value
            for key in (architecture, *([] if entry is None else [entry])):
                pairs = zip(place.keys, place.values, strict=True) if isinstance(place, ast.Dict) else ()
                place = next((value for k, value in pairs if isinstance(k, ast.Constant) and k.value == key), None)
            if isinstance(place, ast.Call):
                lines = source.encode().splitlines(keepends=True)
                start = sum(map(len, lines[: place.lineno - 1])) + place.col_offset
                end = sum(map(len, lines[: place.end_lineno - 1])) + place.end_col_offset
                defaults = choice._field_defaults
                fields = [(name, value) for name, value in choice._asdict().items() if value != defaults.get(name)]
                text = ", ".join(f"{name}={value}" if name in defaults else str(value) for name, value in fields)
                return (source.encode()[:start] + f"Launch({text})".encode() + source.encode()[end:]).decode()
    wanted = f"{variable}[{architecture}]" + ("" if entry is None else f"[{entry!r}]")
    raise ValueError(f"rewrite: source must hold the launch choice {wanted}, got none")


def write(name: str, architecture: int, choice: tuple, directory: Path = KERNELS) -> Path:
    """Put ``choice`` into the source of the table ``name`` in ``directory``."""
    table = TABLES[name]
    file, launch = directory / Path(table.module.__file__).name, table.module.Launch(*choice)
    file.write_text(rewrite(file.read_text(), table.variable, architecture, table.entry, launch))
    return file


def compile_ahead(names: Sequence[str], seconds: float) -> None:
    """Fill Triton's cache with every candidate's kernels, a process a core."""
    count = min(os.cpu_count() or 1, 16)
    command = [sys.executable, "-m", "bench.tune", *names, "--architecture", str(capability()), "--compile"]
    workers = [
        subprocess.Popen([*command, f"{i}/{count}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for i in range(count)
    ]
    until = time.monotonic() + seconds
    for worker in workers:
        try:
            worker.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()


def compile_share(names: Sequence[str], architecture: int, share: str) -> int:
    """Compile every candidate whose number leaves ``index`` when divided by ``count``; how many did."""
    from tests.kernels.compiling import pretend

    pretend(architecture)
    (index, count), done = map(int, share.split("/")), 0
    jobs = [(TABLES[name], choice) for name in names for choice in TABLES[name].tried(architecture)]
    for table, choice in jobs[index::count]:
        # One video is enough: others launch the same kernel.
        case = next(table.cases("meta"))
        with chosen(table, architecture, choice):
            try:
                case.ways[0].call(*case.make())
                done += 1
            except Exception as error:
                # It is left out when it is measured, too.
                print(f"{choice}: {describe(error)}")
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; all if none")
    parser.add_argument("--write", action="store_true", help="write the best choices into the kernels' sources")
    parser.add_argument("--seconds", type=float, default=120, help="about how long it may take (120)")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    parser.add_argument("--architecture", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names = options.tables or list(TABLES)
    if unknown := set(names) - set(TABLES):
        parser.error(f"TABLE must be of {', '.join(TABLES)}, got {', '.join(sorted(unknown))}")
    if options.compile:
        print(compile_share(names, options.architecture, options.compile))
        return 0
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed to measure, and PyTorch finds none")
    started = time.monotonic()
    compile_ahead(names, options.seconds / 2)
    run = Run(Setup("cuda", torch.bfloat16, MERV), bandwidth=copy_bandwidth())
    for case in catalogue.gemm_cases(setup_on("cuda", batches=(1, 8))):
        examine(run, case._replace(ways=case.ways[:1]))
    for i, name in enumerate(names):
        remaining = options.seconds - (time.monotonic() - started)
        best = tune(run, name, remaining / (len(names) - i))
        if best and options.write:
            print(f"{name}: written to {write(name, capability(), best)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
