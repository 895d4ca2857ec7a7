"""Every CUDA kernel once at small odd shapes, forward and backward: what compute-sanitizer runs.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m bench.sanitize
    compute-sanitizer --tool racecheck python -m bench.sanitize

Without PyTorch's cache of memory every tensor is an allocation of its own, past which memcheck sees every step. The
launches themselves are called, not the ops: products by cuBLAS are not ours to check. What they compute is checked
by the tests; here it only has to be finite. Without a GPU this runs in Triton's interpreter, in float16.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    # Before Triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch import Tensor

from bench.cases import tensors_of
from merv_fast import ops
from merv_fast.kernels import (
    _blend,
    _gemm,
    _outer,
    _scoring,
    fuse_encoders,
    pool_project,
    pool_project_fuse,
    pool_tokens,
    temporal_attention,
)
from merv_fast.ops._native import native_fault
from tests.kernels.schedules import scheduled

__all__ = ["launches"]


def launches(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, call) of every kernel and path."""
    half = torch.bfloat16 if device == "cuda" else torch.float16
    for dtype in (half, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield f"pool_tokens, {name}", lambda dtype=dtype: pool(device, dtype)
        yield f"pool_tokens with scores, {name}", lambda dtype=dtype: pool_with_scores(device, dtype)
        yield f"scoring and outer, {name}", lambda dtype=dtype: pass_over_matrices(device, dtype)
        yield f"GEMM, {name}", lambda dtype=dtype: gemm(device, dtype, [40, 24], 48)
        yield f"GEMM, odd, {name}", lambda dtype=dtype: gemm(device, dtype, [33, 7], 35)
        yield f"GEMM, persistent, {name}", lambda dtype=dtype: persistent_gemm(device, dtype)
        yield f"tail, dependent, {name}", lambda dtype=dtype: dependent_tail(device, dtype)
        yield f"tail of MLPs, persistent, dependent, {name}", lambda dtype=dtype: tail_of_mlps(device, dtype)
        yield f"fuse_encoders, {name}", lambda dtype=dtype: fuse(device, dtype)
        yield f"dots and blend, {name}", lambda dtype=dtype: tail_backward(device, dtype)
        for window, width in ((4, 48), (5, 39), (18, 48)):
            call = lambda dtype=dtype, window=window, width=width: attend(device, dtype, window, width)  # noqa: E731
            yield f"temporal_attention, window {window}, width {width}, {name}", call
    if device == "cpu" or native_fault("cuda") is None:
        yield "resample_frames", lambda: resample(device)


def rand(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def pool(device: str, dtype: torch.dtype) -> Sequence[Tensor]:
    # A view that ends where its memory does, of an odd width.
    x = rand(device, dtype, 2, 3, 36, 37)[:, :, 1:, 1:]
    out = pool_tokens.launch(x, (5, 7), (3, 4), 2)
    return out, pool_tokens.launch_backward(out, (5, 7), (3, 4), 3)


def pool_with_scores(device: str, dtype: torch.dtype) -> Sequence[Tensor]:
    grids, widths = [(4, 4), (3, 5)], [70, 24]
    xs = [rand(device, dtype, 2, 3, h * w, C) for (h, w), C in zip(grids, widths, strict=True)]
    outs = pool_project.token_buffers(2, 12, xs)
    vectors = [torch.randn(C, device=device) for C in widths]
    sums, chunks = pool_tokens.pool(xs, grids, (2, 2), 3, outs, vectors)
    return *outs, *(sums[:, e, :count] for e, count in enumerate(chunks))


def pass_over_matrices(device: str, dtype: torch.dtype) -> Sequence[Tensor]:
    # Rows that are not next to each other, of odd and even widths.
    weights = [rand(device, dtype, 33, 1 + C)[:, 1:] for C in (37, 48)]
    biases, query, bias = [rand(device, dtype, 33) for _ in weights], rand(device, dtype, 33), rand(device, dtype, 2)
    vectors, offsets = _scoring.scoring(weights, query, biases, bias)
    grads = [rand(device, dtype, 33, C) for C in (37, 48)]
    even, _ = _scoring.scoring([rand(device, dtype, 40, 48)], rand(device, dtype, 40))
    return *vectors, offsets, *even, _outer.add_outer(grads, weights, query, vectors), *grads


def gemm(device: str, dtype: torch.dtype, widths: list[int], N: int) -> Sequence[Tensor]:
    xs, ws = [rand(device, dtype, 2, 21, K) for K in widths], [rand(device, dtype, N, K) for K in widths]
    biases = [rand(device, dtype, N) for _ in widths]
    sums = torch.randn(2, 2, 3, device=device)
    tokens, w = _gemm.project_weighed(xs, ws, biases, sums, [3, 2], torch.randn(2, device=device))
    scores = torch.empty(2, _gemm.score_chunks(2, 21, N, dtype), device=device)
    hidden = _gemm.project(xs[0], ws[0], biases[0], True, (torch.randn(N, device=device), scores))
    return tokens, w, hidden, scores


def persistent_gemm(device: str, dtype: torch.dtype) -> Sequence[Tensor]:
    """Four or more tiles by two programs."""
    with scheduled(2, persistent=True):
        return gemm(device, dtype, [40, 24], 272)


def dependent_tail(device: str, dtype: torch.dtype) -> Sequence[Tensor]:
    xs, weights = [rand(device, dtype, 2, 3, 16, C) for C in (40, 24)], [rand(device, dtype, 48, C) for C in (40, 24)]
    biases, query, bias = [rand(device, dtype, 48) for _ in weights], rand(device, dtype, 48), rand(device, dtype, 2)
    with scheduled(dependent=True):
        return pool_project_fuse.launch(xs, weights, biases, query, bias, (4, 4, 4, 4), (2, 2), 3)


def tail_of_mlps(device: str, dtype: torch.dtype) -> Sequence[Tensor]:
    """Of three encoders, the smallest number whose weights are padded."""
    shapes = [shape for C in (40, 24, 33) for shape in ((48, C), (48, 48))]
    weights, biases = [rand(device, dtype, *shape) for shape in shapes], [rand(device, dtype, 48) for _ in shapes]
    xs, query = [rand(device, dtype, 2, 3, 16, C) for C in (40, 24, 33)], rand(device, dtype, 48)
    with scheduled(2, persistent=True, dependent=True):
        return pool_project_fuse.launch(xs, weights, biases, query, rand(device, dtype, 3), (4, 4) * 3, (2, 2), 3)


def fuse(device: str, dtype: torch.dtype) -> Sequence[Tensor]:
    values, query = [rand(device, dtype, 2, S, 37) for S in (35, 1)], rand(device, dtype, 37)
    tokens, w = fuse_encoders.launch(values, query, rand(device, dtype, 2))
    dvalues, *rest = fuse_encoders.launch_backward(tokens, w, values, query, w)
    return tokens, w, *dvalues, *rest


def tail_backward(device: str, dtype: torch.dtype) -> Sequence[Tensor]:
    grads, values = ([rand(device, dtype, 2, 35, D) for D in (37, 24)] for _ in range(2))
    dw, means = _blend.dots(grads, values)
    vectors = [torch.randn(D, device=device) for D in (37, 24)]
    _blend.blend(dw, grads=grads, ds=dw, vectors=vectors, dvalues=grads, values=values, weighed=values)
    return dw, means, *grads, *values


def attend(device: str, dtype: torch.dtype, window: int, width: int) -> Sequence[Tensor]:
    qkv = rand(device, dtype, 2 * window, 5, 3 * width)
    out = temporal_attention.launch(qkv, 3, window)
    return out, temporal_attention.launch_backward(out, qkv, 3, window)


def resample(device: str) -> Sequence[Tensor]:
    frames = torch.randint(0, 256, (2, 33, 57, 3), dtype=torch.uint8, device=device)
    found = []
    for size, method in (((70, 22), "bicubic"), ((9, 57), "bilinear"), ((33, 20), "bicubic")):
        table = torch.randn(3, 256, device=device)
        found += [ops.resample_frames(frames, size, method)]
        found += ops.resample_normalise(frames, size, method, (1, 2, size[0] - 3, size[1] - 5), [table])
    return found


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wrong = []
    for name, call in launches(device):
        torch.manual_seed(0)
        finite = all(out.isfinite().all() for out in tensors_of(call()))
        if device == "cuda":
            torch.cuda.synchronize()
        print(name, "" if finite else "is NOT FINITE", flush=True)
        if not finite:
            wrong.append(name)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
