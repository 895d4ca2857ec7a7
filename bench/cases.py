"""What bench.kernels checks and times: each op at MERV's shapes, beside the ways it competes with."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple
from warnings import catch_warnings, simplefilter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import baselines
from merv_fast import ops
from merv_fast.encoders import encoder_config
from merv_fast.encoders.vit import Block
from merv_fast.kernels import _gemm
from merv_fast.kernels import fuse_encoders as fuse_kernels
from merv_fast.kernels import pool_project as pool_project_kernels
from merv_fast.kernels import pool_project_fuse as tail_kernels
from merv_fast.kernels import pool_tokens as pool_kernels
from merv_fast.kernels import temporal_attention as temporal_kernels
from merv_fast.kernels._launch import Cost
from merv_fast.kernels._scoring import scoring
from merv_fast.modules import Tail, build_fusion, build_projector
from merv_fast.modules.fusion import convert_fusion_state_dict
from merv_fast.ops._kernels import KERNELS

__all__ = ["MERV", "SMALL", "Case", "Setup", "Shapes", "Way", "cases", "gemm_cost", "serving", "tensors_of"]

OURS, EAGER, COMPILED, CUBLAS = "merv_fast", "eager", "compiled", "cuBLAS"
STREAM, PACKED = "SDPA, stream transposed", "SDPA, qkv transposed"
GEMM, TAIL, TAIL_MLP = "GEMM", "pool_project_fuse, linear", "pool_project_fuse, MLP"
TAIL_TRAINING = f"{TAIL}, forward+backward"
TEMPORAL, TEMPORAL_TRAINING = "temporal_attention", "temporal_attention, forward+backward"
RESAMPLE, BLOCK = "resample_frames", "ViT block"


class Shapes(NamedTuple):
    """The sizes of a run; those in ``compiled`` are the batches for which baselines are compiled."""

    batches: tuple[int, ...]
    compiled: tuple[int, ...]
    slots: int
    widths: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    out_grid: tuple[int, int]
    D: int
    query_width: int
    patches: int
    heads: int
    window: int
    clip: tuple[int, int, int]
    size: tuple[int, int]

    @property
    def S(self) -> int:
        """Visual tokens of a video."""
        return self.slots * self.out_grid[0] * self.out_grid[1]


MERV = Shapes(
    batches=(1, 2, 4, 8),
    compiled=(1, 8),
    slots=16,
    widths=(1024, 1024, 768, 768),
    grids=((16, 16), (16, 16), (14, 14), (14, 14)),
    out_grid=(8, 8),
    D=4096,
    query_width=3072,
    patches=257,
    heads=16,
    window=8,
    clip=(32, 720, 1280),
    size=(224, 224),
)
SMALL = Shapes((1, 2), (), 2, (24, 21), ((4, 4), (3, 5)), (2, 2), 40, 16, 5, 2, 2, (2, 20, 30), (9, 11))
"""Serves only to check."""


class Setup(NamedTuple):
    """Where a run takes place, and with what."""

    device: str
    dtype: torch.dtype
    shapes: Shapes

    def rand(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values."""
        return (torch.randn(*shape, device=self.device) * scale).to(self.dtype)


class Way(NamedTuple):
    """One way to compute a case.

    ``lows`` are honest evaluations in the same dtype, from the worst of which its budget comes; without any, the way
    must itself be exact in float64. ``shown`` is what to compare of its result, where that is not all of it.
    """

    name: str
    call: Callable[..., Any]
    lows: Sequence[Callable[..., Any]] = ()
    shown: Callable[[Any], Any] | None = None


class Case(NamedTuple):
    """``make()`` gives the arguments of every way, of ``exact``, which is evaluated in float64, and of ``cost``."""

    op: str
    B: int
    make: Callable[[], tuple]
    exact: Callable[..., Any]
    ways: list[Way]
    cost: Callable[..., Cost]


def cases(setup: Setup) -> Iterator[Case]:
    """In the order of what matters most, as time may run out; the roof of products comes first."""
    yield from gemm_cases(setup)
    yield from tail_cases(setup, hidden=False)
    yield from tail_part_cases(setup)
    yield from temporal_cases(setup)
    yield from resample_cases(setup)
    yield from pool_tokens_cases(setup)
    yield from block_cases(setup)
    yield from gelu_cases(setup)
    yield from tail_cases(setup, hidden=True)
    yield from tail_training_cases(setup)
    yield from pool_project_cases(setup, hidden=False)
    yield from pool_project_cases(setup, hidden=True)
    yield from fuse_cases(setup)


def gemm_cost(shapes: Shapes, B: int, itemsize: int) -> Cost:
    """The product that stands for a roof: 1024B x 3584 x 4096 for MERV."""
    M, K, N = B * shapes.S, sum(shapes.widths), shapes.D
    return Cost(2 * M * K * N, (M * K + K * N + M * N) * itemsize)


def gemm_cases(setup: Setup) -> Iterator[Case]:
    K, N = sum(setup.shapes.widths), setup.shapes.D
    bias = torch.zeros(N, dtype=setup.dtype, device=setup.device)

    def low(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x.float(), w.float()).to(x.dtype)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return _gemm.project(x[None], w, bias)[0]

    for B in setup.shapes.batches:

        def make(B: int = B) -> tuple:
            return setup.rand(B * setup.shapes.S, K), setup.rand(N, K, scale=K**-0.5)

        def cost(x: Tensor, w: Tensor, B: int = B) -> Cost:
            return gemm_cost(setup.shapes, B, x.element_size())

        yield Case(GEMM, B, make, F.linear, [Way(CUBLAS, F.linear, [low]), Way(OURS, ours, [low])], cost)


def tail_cases(setup: Setup, hidden: bool) -> Iterator[Case]:
    """The whole tail, as modules: query and bias are folded once, as in inference."""

    def ours(xs: list[Tensor], tail: Tail, plain: nn.Module) -> Any:
        return tail(xs)

    def theirs(xs: list[Tensor], tail: Tail, plain: nn.Module) -> Any:
        return plain(xs)

    def cost(xs: list[Tensor], tail: Tail, plain: nn.Module) -> Cost:
        return tail_kernels.cost(*tail_arguments(setup, xs, tail))

    for B in setup.shapes.batches:
        # MERV's own tail against the compiled one at every batch.
        compiled = compiles(setup, B) or (not hidden and setup.device == "cuda")
        ways = [Way(OURS, ours, [referenced(ours)]), *baseline(theirs, compiled, ours)]
        yield Case(TAIL_MLP if hidden else TAIL, B, partial(make_tail, setup, B, hidden), ours, ways, cost)


def make_tail(setup: Setup, B: int, hidden: bool) -> tuple[list[Tensor], Tail, baselines.ReferenceTail]:
    """Feature maps, our tail, and the reference's with the same parameters."""
    shapes, E = setup.shapes, len(setup.shapes.widths)
    sizes = shapes.widths, shapes.grids, shapes.D, shapes.query_width
    with torch.device(setup.device):
        plain = baselines.ReferenceTail(*sizes, hidden, shapes.out_grid)
        fusion = build_fusion("cross_attention_avg_lq", E, shapes.D, query_width=shapes.query_width)
    projectors = [projector(setup, C, grid, hidden) for C, grid in zip(shapes.widths, shapes.grids, strict=True)]
    for ours, theirs in zip(projectors, plain.projectors, strict=True):
        ours.projector.projector.load_state_dict(theirs.state_dict())
    attention = {f"attention.{name}": tensor for name, tensor in plain.attention.state_dict().items()}
    fusion.load_state_dict(convert_fusion_state_dict(attention | {"Q": plain.query[0]}))
    tail, plain = (module.to(setup.dtype).eval() for module in (Tail(projectors, fusion), plain))
    xs = [setup.rand(B, shapes.slots, H * W, C) for (H, W), C in zip(shapes.grids, shapes.widths, strict=True)]
    return xs, tail, plain


def projector(setup: Setup, C: int, grid: tuple[int, int], hidden: bool) -> nn.Module:
    shapes = setup.shapes
    tokens, mlp = shapes.out_grid[0] * shapes.out_grid[1], "gelu-mlp" if hidden else "linear"
    with torch.device(setup.device):
        return build_projector(f"3davg+{mlp}", C, shapes.D, tokens, shapes.slots, grid).to(setup.dtype)


def tail_arguments(setup: Setup, xs: list[Tensor], tail: Tail) -> tuple:
    """The op's own arguments."""
    linears = [layer for one in tail.projectors for layer in one.projector.linears]
    query, bias = tail.fusion.folded(linears[0].weight.dtype)
    grids = [side for grid in setup.shapes.grids for side in grid]
    layers = [layer.weight for layer in linears], [layer.bias for layer in linears]
    return xs, *layers, query, bias, grids, setup.shapes.out_grid, setup.shapes.slots


def tail_training_cases(setup: Setup) -> Iterator[Case]:
    """Forward and backward of the tail with frozen encoders, in all its parameters."""

    def ours(xs: list[Tensor], tail: Tail, plain: nn.Module, grad: Tensor) -> list[Tensor]:
        return trained(call_module, tail, xs, grad, tail.fusion.Q)

    def theirs(run: Callable, xs: list[Tensor], tail: Tail, plain: nn.Module, grad: Tensor) -> list[Tensor]:
        return trained(run, plain, xs, grad, plain.query)

    def cost(xs: list[Tensor], tail: Tail, plain: nn.Module, grad: Tensor) -> Cost:
        # One product more in the backward, for the matrices; the maps and matrices are read again, the tokens' gradient
        # is read and those of the matrices are written.
        forward = tail_kernels.cost(*tail_arguments(setup, xs, tail))
        matrices = sum(p.numel() for p in tail.projectors.parameters()) * grad.element_size()
        return Cost(2 * forward.flops, 2 * forward.bytes + matrices)

    for B in setup.shapes.batches:

        def make(B: int = B) -> tuple:
            return *make_tail(setup, B, False), setup.rand(B, setup.shapes.S, setup.shapes.D)

        ways = [Way(OURS, ours, [referenced(ours)]), *baseline(theirs, compiles(setup, B), ours, inner=call_module)]
        yield Case(TAIL_TRAINING, B, make, ours, ways, cost)


def call_module(module: nn.Module, *arguments: Any) -> Any:
    return module(*arguments)


def trained(run: Callable, module: nn.Module, xs: list[Tensor], grad: Tensor, query: Tensor) -> list[Tensor]:
    """The tokens, and gradients of the projectors' parameters and of the learned query; all others are made too."""
    shown = [*module.projectors.parameters(), query]
    rest = [p for p in module.parameters() if all(p is not one for one in shown)]
    with torch.enable_grad():
        tokens, _ = run(module, xs)
        grads = torch.autograd.grad(tokens, [*shown, *rest], grad, allow_unused=True)
    return [tokens.detach(), *(g.flatten() for g in grads[: len(shown)])]


def tail_part_cases(setup: Setup) -> Iterator[Case]:
    """Where the time of pool_project_fuse goes: its two launches, and what a changed weight costs."""
    for B in setup.shapes.batches:
        yield pooling_case(setup, B)
        yield weighed_gemm_case(setup, B)
    yield scoring_case(setup)


def pooling_case(setup: Setup, B: int) -> Case:
    shapes, E = setup.shapes, len(setup.shapes.widths)

    def make() -> tuple:
        xs, _, _ = make_tail(setup, B, False)
        return xs, [torch.randn(C, device=setup.device) for C in shapes.widths]

    def ours(xs: list[Tensor], vectors: list[Tensor]) -> tuple:
        tokens = pool_project_kernels.token_buffers(B, shapes.S, xs)
        return tokens, *pool_kernels.pool(xs, shapes.grids, shapes.out_grid, shapes.slots, tokens, vectors)

    def shown(result: tuple) -> list[Tensor]:
        tokens, sums, chunks = result
        scores = [sums[:, e, : chunks[e]].sum(1) for e in range(E)]
        return [*(t[..., :C] for t, C in zip(tokens, shapes.widths, strict=True)), *scores]

    def plainly(xs: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
        pool = REFERENCES["pool_tokens"]
        tokens = [
            pool(x, grid, shapes.out_grid, shapes.slots).flatten(1, 2) for x, grid in zip(xs, shapes.grids, strict=True)
        ]
        return [*tokens, *((t.to(a.dtype) @ a).sum(1) for t, a in zip(tokens, vectors, strict=True))]

    def cost(xs: list[Tensor], vectors: list[Tensor]) -> Cost:
        each = [
            pool_kernels.cost(x, grid, shapes.out_grid, shapes.slots) for x, grid in zip(xs, shapes.grids, strict=True)
        ]
        return Cost(sum(one.flops for one in each), sum(one.bytes for one in each))

    return Case("  its pooling and scores", B, make, plainly, [Way(OURS, ours, [plainly], shown)], cost)


def weighed_gemm_case(setup: Setup, B: int) -> Case:
    shapes, E, chunks = setup.shapes, len(setup.shapes.widths), 1024

    def make() -> tuple:
        tokens = [setup.rand(B, shapes.S, C) for C in shapes.widths]
        ws = [setup.rand(shapes.D, C, scale=C**-0.5) for C in shapes.widths]
        sums = torch.randn(B, E, chunks, device=setup.device) * shapes.S / chunks**0.5
        biases = [setup.rand(shapes.D) for _ in shapes.widths]
        return tokens, ws, biases, sums, torch.randn(E, device=setup.device)

    def ours(tokens: list, ws: list, biases: list, sums: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        return _gemm.project_weighed(tokens, ws, biases, sums, [chunks] * E, offsets)

    def plainly(tokens: list, ws: list, biases: list, sums: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        w = torch.softmax(sums.sum(2) / shapes.S + offsets, 1)
        values = [F.linear(*each) for each in zip(tokens, ws, biases, strict=True)]
        return sum(w[:, e, None, None].to(value.dtype) * value for e, value in enumerate(values)), w

    def cost(tokens: list, *rest: Any) -> Cost:
        return gemm_cost(shapes, B, tokens[0].element_size())

    return Case("  its GEMM", B, make, plainly, [Way(OURS, ours, [plainly])], cost)


def chain_case(setup: Setup, B: int, hidden: bool = False) -> Case:
    """All launches of pool_project_fuse, one after another, its score vectors remembered."""
    reference = REFERENCES["pool_project_fuse"]

    def make() -> tuple:
        xs, tail, _ = make_tail(setup, B, hidden)
        return tail_arguments(setup, xs, tail)

    ways = [Way(OURS, tail_kernels.launch, [referenced(reference)])]
    return Case(TAIL_MLP if hidden else TAIL, B, make, reference, ways, tail_kernels.cost)


def scoring_case(setup: Setup) -> Case:
    def make() -> tuple:
        xs, tail, _ = make_tail(setup, 1, False)
        _, *rest = tail_arguments(setup, xs, tail)
        return tuple(rest[:4])

    def ours(weights: list, biases: list, query: Tensor, bias: Tensor) -> tuple:
        return scoring(weights, query, biases, bias)

    def cast(weights: list, biases: list, query: Tensor, bias: Tensor) -> list[Tensor]:
        wide = torch.promote_types(query.dtype, torch.float32)
        q = query.to(wide)
        return [*(q @ w.to(wide) for w in weights), torch.stack([b.to(wide) @ q for b in biases]) + bias.to(wide)]

    def cost(weights: list, *rest: Any) -> Cost:
        numbers = sum(w.numel() for w in weights)
        return Cost(2 * numbers, numbers * weights[0].element_size())

    ways = [Way(OURS, ours, [cast]), Way(EAGER, cast)]
    return Case("  its score vectors, made anew", 1, make, cast, ways, cost)


def pool_project_cases(setup: Setup, hidden: bool) -> Iterator[Case]:
    shapes = setup.shapes
    C, grid = shapes.widths[0], shapes.grids[0]

    def ours(x: Tensor, one: nn.Module) -> Tensor:
        return one(x)

    def plain(x: Tensor, one: nn.Module) -> Tensor:
        return baselines.pool_project(x, one.projector.projector, grid, shapes.out_grid)

    def cost(x: Tensor, one: nn.Module) -> Cost:
        linears = one.projector.linears
        layers = [layer.weight for layer in linears], [layer.bias for layer in linears]
        return pool_project_kernels.cost(x, *layers, grid, shapes.out_grid, shapes.slots)

    for B in shapes.batches:

        def make(B: int = B) -> tuple:
            x = setup.rand(B, shapes.slots, grid[0] * grid[1], C)
            return x, projector(setup, C, grid, hidden)

        ways = [Way(OURS, ours, [referenced(ours)]), *baseline(plain, compiles(setup, B), ours)]
        yield Case(f"pool_project, {'MLP' if hidden else 'linear'}", B, make, ours, ways, cost)


def pool_tokens_cases(setup: Setup) -> Iterator[Case]:
    shapes = setup.shapes
    for C, grid in ((shapes.widths[0], shapes.grids[0]), (shapes.widths[-1], shapes.grids[-1])):
        for B in shapes.batches:
            yield pool_case(setup, B, C, grid)
            yield pool_backward_case(setup, B, C, grid)


def pool_case(setup: Setup, B: int, C: int, grid: tuple[int, int]) -> Case:
    shapes = setup.shapes

    def make() -> tuple:
        return (setup.rand(B, shapes.slots, grid[0] * grid[1], C),)

    def ours(x: Tensor) -> Tensor:
        return ops.pool_tokens(x, grid, shapes.out_grid)

    def plain(x: Tensor) -> Tensor:
        return baselines.pool_tokens(x, grid, shapes.out_grid)

    def cost(x: Tensor) -> Cost:
        return pool_kernels.cost(x, grid, shapes.out_grid, shapes.slots)

    ways = [Way(OURS, ours, [referenced(ours)]), *baseline(plain, compiles(setup, B), ours)]
    return Case(f"pool_tokens, {grid[0]}x{grid[1]}x{C}", B, make, ours, ways, cost)


def pool_backward_case(setup: Setup, B: int, C: int, grid: tuple[int, int]) -> Case:
    shapes = setup.shapes

    def make() -> tuple:
        return (setup.rand(B, shapes.slots, shapes.S // shapes.slots, C),)

    def ours(grad: Tensor) -> Tensor:
        return torch.ops.merv_fast.pool_tokens_backward(grad, grid, shapes.out_grid, shapes.slots)

    def cost(grad: Tensor) -> Cost:
        tokens = B * shapes.slots * grid[0] * grid[1] * C
        return Cost(tokens, (tokens + grad.numel()) * grad.element_size())

    name = f"pool_tokens_backward, {grid[0]}x{grid[1]}x{C}"
    return Case(name, B, make, ours, [Way(OURS, ours, [referenced(ours)])], cost)


def fuse_cases(setup: Setup) -> Iterator[Case]:
    shapes, E, D = setup.shapes, len(setup.shapes.widths), setup.shapes.D
    fuse, plain = ops.fuse_encoders, baselines.fuse_encoders

    def step(fuse: Callable, values: list, query: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (*values, query, bias)]
            tokens, _ = fuse(leaves[:E], *leaves[E:])
            return [tokens.detach(), *torch.autograd.grad(tokens, leaves, grad)]

    both = partial(step, fuse)

    def cost(values: list, query: Tensor, bias: Tensor, grad: Tensor) -> Cost:
        # <G, V> and the means, then w G + ds q: six operations a value. Values and gradient are read, the
        # gradient again, and the values' gradients written.
        forward, numbers = fuse_kernels.cost(values, query, bias), E * grad.numel()
        moved = (2 * numbers + 2 * grad.numel()) * grad.element_size()
        return Cost(forward.flops + 6 * numbers, forward.bytes + moved)

    for B in shapes.batches:

        def make(B: int = B) -> tuple:
            values = [setup.rand(B, shapes.S, D) for _ in range(E)]
            return values, setup.rand(D, scale=D**-0.5), setup.rand(E)

        def make_grad(make: Callable = make, B: int = B) -> tuple:
            return *make(), setup.rand(B, shapes.S, D)

        ways = [Way(OURS, fuse, [referenced(fuse)]), *baseline(plain, compiles(setup, B), fuse)]
        yield Case("fuse_encoders", B, make, fuse, ways, fuse_kernels.cost)
        ways = [Way(OURS, both, [referenced(both)]), *baseline(step, compiles(setup, B), both, inner=plain)]
        yield Case("fuse_encoders, forward+backward", B, make_grad, both, ways, cost)


def temporal_cases(setup: Setup) -> Iterator[Case]:
    shapes = setup.shapes
    heads, window, N, C = shapes.heads, shapes.window, shapes.patches, shapes.widths[0]

    def ours(qkv: Tensor, stream: Tensor, sequences: Tensor) -> Tensor:
        return ops.temporal_attention(qkv, heads, shapes.slots, window)

    def packed(qkv: Tensor, stream: Tensor, sequences: Tensor) -> Tensor:
        return baselines.temporal_attention(qkv, heads, window)

    def as_languagebind(qkv: Tensor, stream: Tensor, sequences: Tensor) -> Tensor:
        return baselines.temporal_stream(stream, sequences, heads)

    def cost(qkv: Tensor, stream: Tensor, sequences: Tensor) -> Cost:
        return temporal_kernels.cost(qkv, heads, window)

    def backward(qkv: Tensor, stream: Tensor, sequences: Tensor) -> Tensor:
        return torch.ops.merv_fast.temporal_attention_backward(stream, qkv, heads, window)

    def backward_cost(qkv: Tensor, stream: Tensor, sequences: Tensor) -> Cost:
        return Cost(14 * window * stream.numel(), 7 * stream.numel() * stream.element_size())

    def step(attend: Callable, qkv: Tensor, stream: Tensor, sequences: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaf = qkv.detach().requires_grad_()
            out = attend(leaf, stream, sequences)
            return [out.detach(), *torch.autograd.grad(out, leaf, stream)]

    def both_cost(*arguments: Tensor) -> Cost:
        forward, back = cost(*arguments), backward_cost(*arguments)
        return Cost(forward.flops + back.flops, forward.bytes + back.bytes)

    for B in shapes.batches:

        def make(rows: int = B * shapes.slots) -> tuple:
            qkv = setup.rand(rows, N, 3 * C)
            sequences = qkv.view(-1, window, N, 3 * C).transpose(1, 2).reshape(-1, window, 3 * C)
            return qkv, setup.rand(rows, N, C), sequences

        ways = [Way(OURS, ours, [referenced(ours)]), Way(STREAM, as_languagebind), Way(PACKED, packed)]
        if compiles(setup, B):
            ways.append(Way(COMPILED, compile_once(packed), [packed, referenced(ours)]))
        yield Case(TEMPORAL, B, make, ours, ways, cost)
        ways = [Way(OURS, backward, [referenced(backward)])]
        yield Case("temporal_attention_backward", B, make, backward, ways, backward_cost)
        both = partial(step, ours)
        ways = [Way(OURS, both, [referenced(both)]), Way(PACKED, partial(step, packed))]
        yield Case(TEMPORAL_TRAINING, B, make, both, ways, both_cost)


def resample_cases(setup: Setup) -> Iterator[Case]:
    """Frames on the GPU; what it makes must be the reference's to the bit."""
    for B in setup.shapes.batches:
        for method in ("bicubic", "bilinear"):
            yield resample_case(setup, B, method)
        yield normalise_case(setup, B, "bicubic")


def make_clip(setup: Setup, B: int) -> tuple[Tensor, Tensor]:
    """Frames of B videos, and a table for 256 levels."""
    frames, H, W = setup.shapes.clip
    clip = torch.randint(0, 256, (B * frames, H, W, 3), dtype=torch.uint8, device=setup.device)
    return clip, torch.randn(3, 256, device=setup.device).to(setup.dtype)


def resample_case(setup: Setup, B: int, method: str) -> Case:
    size = setup.shapes.size

    def ours(clip: Tensor, table: Tensor) -> Tensor:
        return ops.resample_frames(clip, size, method)

    def plainly(clip: Tensor, table: Tensor) -> Tensor:
        return RESAMPLING.reference(clip, size, method)

    def cost(clip: Tensor, table: Tensor) -> Cost:
        return resample_cost(clip, size, method, len(clip) * 3 * size[0] * size[1])

    return Case(f"{RESAMPLE}, {method}", B, partial(make_clip, setup, B), plainly, [Way(OURS, ours, [plainly])], cost)


def normalise_case(setup: Setup, B: int, method: str) -> Case:
    size, crop = setup.shapes.size, (0, 0, *setup.shapes.size)

    def ours(clip: Tensor, table: Tensor) -> list[Tensor]:
        return ops.resample_normalise(clip, size, method, crop, [table])

    def plainly(clip: Tensor, table: Tensor) -> list[Tensor]:
        index = RESAMPLING.reference(clip, size, method).movedim(-1, -3).int()
        return [table[torch.arange(3, device=clip.device)[:, None, None], index]]

    def cost(clip: Tensor, table: Tensor) -> Cost:
        return resample_cost(clip, size, method, len(clip) * 3 * size[0] * size[1] * table.element_size())

    name = f"resample_normalise, {method}"
    return Case(name, B, partial(make_clip, setup, B), plainly, [Way(OURS, ours, [plainly])], cost)


def resample_cost(clip: Tensor, size: tuple[int, int], method: str, written: int) -> Cost:
    """Two operations for each coefficient of the two passes; the frames read once, the result written."""
    frames, H, W, C = clip.shape
    taps = [RESAMPLING.coefficients(n, m, method) for n, m in ((W, size[1]), (H, size[0]))]
    across, down = (sum(len(coefficients) for _, coefficients in one) for one in taps)
    return Cost(2 * frames * C * (H * across + size[1] * down), clip.numel() + written)


def gelu_cases(setup: Setup) -> Iterator[Case]:
    """The MLP's first layer in an encoder, with GELU in a kernel of its own or in the product's epilogue."""
    C, rows = setup.shapes.widths[0], setup.shapes.slots * setup.shapes.patches

    def plain(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, w, bias))

    def ours(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return _gemm.project(x[None], w, bias, gelu=True)[0]

    def cost(x: Tensor, w: Tensor, bias: Tensor) -> Cost:
        return Cost(2 * x.numel() * len(w), (x.numel() + w.numel() + len(x) * len(w)) * x.element_size())

    for B in setup.shapes.compiled or setup.shapes.batches[:1]:

        def make(B: int = B) -> tuple:
            return setup.rand(B * rows, C), setup.rand(4 * C, C, scale=C**-0.5), setup.rand(4 * C)

        ways = [Way(OURS, ours, [plain]), *baseline(plain, compiles(setup, B), plain)]
        yield Case("encoder's fc1 and GELU", B, make, plain, ways, cost)
        yield Case("encoder's fc1 alone", B, make, F.linear, [Way(CUBLAS, F.linear)], cost)


def block_cases(setup: Setup) -> Iterator[Case]:
    """One block of LanguageBind, with and without its temporal attention, in eager mode and compiled."""
    if setup.device == "cpu":
        return
    config = encoder_config("languagebind-video-noclass", 16)

    def call(x: Tensor, block: nn.Module) -> Tensor:
        return block(x, config.num_frames)

    def make(window: int | None) -> tuple:
        block = Block(replace(config, temporal_window=window))
        return setup.rand(config.num_frames, 257, config.width), block.to(setup.device, setup.dtype).eval()

    def cost(x: Tensor, block: nn.Module) -> Cost:
        matrices = sum(p.numel() for name, p in block.named_parameters() if name.endswith("weight") and p.ndim == 2)
        attention = 4 * len(x) * x.shape[1] ** 2 * x.shape[2]
        flops = 2 * len(x) * x.shape[1] * matrices + attention
        return Cost(flops, (matrices + 2 * x.numel()) * x.element_size())

    for window in (None, config.temporal_window):
        name = f"{BLOCK}, temporal" if window else BLOCK
        lows = [referenced(call)]
        ways = [Way(EAGER, call, lows), Way(COMPILED, compile_once(call), lows)]
        yield Case(name, 1, partial(make, window), call, ways, cost)


def compiles(setup: Setup, B: int) -> bool:
    """Whether baselines are compiled too."""
    return setup.device == "cuda" and B in setup.shapes.compiled


def baseline(
    call: Callable[..., Any], compiled: bool, ours: Callable[..., Any], inner: Callable[..., Any] | None = None
) -> list[Way]:
    """The reference's way in eager mode and, if asked for, compiled; ``ours`` computes the same.

    ``inner``, the first argument of ``call``, is then what is compiled, in the place of ``call``.
    """
    eager = call if inner is None else partial(call, inner)
    ways = [Way(EAGER, eager)]
    if compiled:
        fast = compile_once(call) if inner is None else partial(call, compile_once(inner))
        ways.append(Way(COMPILED, fast, [eager, referenced(ours)]))
    return ways


def compile_once(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, compiled for exactly the shapes that it is called with."""

    def fresh(*arguments: Any) -> Any:
        return call(*arguments)

    # Cases share code: they must not count as each other's recompilations.
    fresh.__code__ = fresh.__code__.replace(co_name=f"case_{id(fresh)}")
    return torch.compile(fresh, dynamic=False)


RESAMPLING = import_module("merv_fast.ops.resample_frames")
REFERENCES = {
    op: getattr(
        import_module(f"merv_fast.ops.{op.removesuffix('_backward')}"),
        "reference_backward" if op.endswith("_backward") else "reference",
    )
    for op in KERNELS
}


def referenced(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` with the ops' references in the place of every kernel."""

    def low(*arguments: Any) -> Any:
        with serving(REFERENCES, next(tensors_of(arguments)).device.type):
            return call(*arguments)

    return low


@contextmanager
def serving(functions: dict[str, Callable[..., Any]], device: str) -> Iterator[None]:
    """While it lasts, ``functions`` are what the ops run on ``device``."""
    library = torch.library.Library("merv_fast", "IMPL")
    with catch_warnings():
        # That they replace others is what they are for.
        simplefilter("ignore")
        for op, function in functions.items():
            library.impl(op, function, device.upper(), allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def tensors_of(values: Any) -> Iterator[Tensor]:
    """The tensors in nested lists and tuples, and modules' parameters."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, nn.Module):
        yield from values.parameters()
    elif isinstance(values, Sequence):
        for value in values:
            yield from tensors_of(value)
