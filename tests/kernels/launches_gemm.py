"""The GEMM of all encoders: MERV's shapes, both ways of reading, every epilogue."""

import torch

from merv_fast.kernels import _gemm
from tests.kernels.registry import case, meta
from tests.kernels.schedules import scheduled

WIDTHS = [1024, 1024, 768, 768]
KERNEL = ("gemm_kernel",)


@case("gemm: weighed", torch.bfloat16, 1, 1024, WIDTHS, 4096, matrix=KERNEL)
@case("gemm: weighed, batch of 8", torch.float16, 8, 1024, WIDTHS, 4096, matrix=KERNEL)
@case("gemm: weighed, small", torch.bfloat16, 2, 64, [72, 72], 256, matrix=KERNEL)
@case("gemm: weighed, eight encoders", torch.bfloat16, 1, 1024, [1024] * 8, 4096, matrix=KERNEL)
@case("gemm: weighed, one encoder of ones", torch.bfloat16, 1, 1, [1], 1, matrix=KERNEL)
@case("gemm: weighed, eight encoders, small", torch.bfloat16, 1, 64, [72] * 8, 256, matrix=KERNEL)
@case("gemm: weighed, eight encoders, odd", torch.float16, 8, 1024, [1024] * 8, 4095, matrix=KERNEL)
@case("gemm: weighed, one encoder", torch.bfloat16, 1, 1024, [1024], 4096, matrix=KERNEL)
@case("gemm: weighed, one encoder, odd", torch.bfloat16, 1, 64, [72], 255, matrix=KERNEL)
@case("gemm: weighed, no descriptors", torch.bfloat16, 1, 1024, [769, 1023], 4095, matrix=KERNEL)
@case("gemm: weighed, float32", torch.float32, 1, 1024, WIDTHS, 4096)
def weighed(dtype, B, S, widths, N):
    E = len(widths)
    _gemm.project_weighed(
        [meta(B, S, K, dtype=dtype) for K in widths],
        [meta(N, K, dtype=dtype) for K in widths],
        [meta(N, dtype=dtype) for _ in widths],
        meta(B, E, 1024, dtype=torch.float32),
        [1024] * E,
        meta(E, dtype=torch.float32),
    )


@case("gemm: weighed, persistent", torch.bfloat16, 1, 1024, WIDTHS, 4096, matrix=KERNEL)
@case("gemm: weighed, batch of 8, persistent", torch.float16, 8, 1024, WIDTHS, 4096, matrix=KERNEL)
@case("gemm: weighed, small, persistent", torch.bfloat16, 2, 64, [72, 72], 256, matrix=KERNEL)
@case("gemm: weighed, one encoder, persistent", torch.bfloat16, 1, 1024, [1024], 4096, matrix=KERNEL)
@case("gemm: weighed, eight encoders, persistent", torch.bfloat16, 1, 1024, [1024] * 8, 4096, matrix=KERNEL)
@case("gemm: weighed, eight encoders, small, persistent", torch.bfloat16, 1, 64, [72] * 8, 256, matrix=KERNEL)
def weighed_persistent(*arguments):
    with scheduled(persistent=True):
        weighed(*arguments)


@case("gemm: weighed, tf32", matrix=KERNEL)
def weighed_in_tf32():
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    weighed(torch.float32, 1, 1024, WIDTHS, 4096)
    torch.backends.cuda.matmul.fp32_precision = precision


@case("gemm: over 2^31 elements", torch.bfloat16, 1, 1 << 20, 1024, 4096, matrix=KERNEL)
@case("gemm: one encoder", torch.bfloat16, 1, 1024, 1024, 4096, matrix=KERNEL)
@case("gemm: one encoder, odd", torch.float16, 1, 1000, 769, 33, matrix=KERNEL)
def plain(dtype, B, S, K, N):
    _gemm.project(meta(B, S, K, dtype=dtype), meta(N, K, dtype=dtype), meta(N, dtype=dtype))


@case("gemm: hidden layer with scores", torch.bfloat16, 4096, matrix=KERNEL)
@case("gemm: hidden layer with scores, odd", torch.bfloat16, 4095, matrix=KERNEL)
@case("gemm: hidden layer with scores, float32", torch.float32, 4096)
def hidden(dtype, N):
    x, w, bias = meta(1, 1024, 1024, dtype=dtype), meta(N, 1024, dtype=dtype), meta(N, dtype=dtype)
    sums = meta(1, _gemm.score_chunks(1, 1024, N, dtype), dtype=torch.float32)
    _gemm.project(x, w, bias, True, (meta(N, dtype=torch.float32), sums))
    _gemm.project(x, w, bias, True)


@case("gemm: hidden layer with scores, persistent", torch.bfloat16, 4096, matrix=KERNEL)
def hidden_persistent(*arguments):
    with scheduled(persistent=True):
        hidden(*arguments)


@case("gemm: hidden layer of ones", matrix=KERNEL)
def hidden_of_ones():
    score = meta(1, dtype=torch.float32), meta(1, 1, dtype=torch.float32)
    _gemm.project(meta(1, 1, 1), meta(1, 1), meta(1), True, score)
