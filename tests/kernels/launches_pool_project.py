"""pool_project and pool_project_fuse: how the pooling and the GEMMs after it depend on each other."""

from itertools import pairwise

import torch

from merv_fast.kernels import _outer, _scoring, pool_project, pool_project_fuse
from tests.kernels.registry import case, meta
from tests.kernels.schedules import scheduled

GRIDS = [(16, 16), (16, 16), (14, 14), (14, 14)]
WIDTHS, D, KERNEL = [1024, 1024, 768, 768], 4096, ("gemm_kernel",)


@case("pool_project_fuse", 1, matrix=KERNEL)
@case("pool_project_fuse: MLP", 2, matrix=KERNEL)
def fuse(layers):
    xs = [meta(1, 16, H * W, C) for (H, W), C in zip(GRIDS, WIDTHS, strict=True)]
    weights = [meta(D, D if layer else C) for C in WIDTHS for layer in range(layers)]
    grids = [side for grid in GRIDS for side in grid]
    pool_project_fuse.launch(xs, weights, [meta(D) for _ in weights], meta(D), meta(4), grids, (8, 8), 16)


@case("pool_project_fuse: dependent", 1, matrix=KERNEL, dependent=2)
@case("pool_project_fuse: MLP, dependent", 2, matrix=KERNEL, dependent=2)
def fuse_dependent(layers):
    with scheduled(dependent=True):
        fuse(layers)


@case("pool_project: persistent too", (768, D), True, matrix=KERNEL, dependent=1)
@case("pool_project: MLP, dependent", (768, D, D), False, matrix=KERNEL, dependent=1)
def project_dependent(widths, persistent):
    weights = [meta(n, m) for m, n in pairwise(widths)]
    with scheduled(dependent=True, persistent=persistent):
        pool_project.launch(meta(1, 16, 196, 768), weights, [meta(n) for n in widths[1:]], (14, 14), (8, 8), 16)


@case("matrices", torch.bfloat16, WIDTHS, D)
@case("matrices: float32, MLP", torch.float32, [D] * 4, D)
@case("matrices: eight, odd width", torch.bfloat16, [769] * 8, 769)
@case("matrices: float16, odd width", torch.float16, [769], 4096)
@case("matrices: float16, odd height and width", torch.float16, [769], 767)
@case("matrices: eight, misaligned", torch.bfloat16, [1024] * 8, D, 1)
@case("matrices: eight, float16, misaligned", torch.float16, [1024] * 8, D, 1)
@case("matrices: eight, float32, misaligned", torch.float32, [1024] * 8, D, 1)
@case("matrices: ones", torch.float16, [1], 1)
def pass_over_matrices(dtype, widths, D, start=0):
    weights, query = [meta(D, C + 16 * start, dtype=dtype)[:, start : start + C] for C in widths], meta(D, dtype=dtype)
    means, _ = _scoring.scoring(weights, query)
    _scoring.scoring(weights, query, [query] * len(weights), meta(len(weights), dtype=dtype))
    _outer.add_outer(weights, weights, query, means)
