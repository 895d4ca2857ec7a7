"""pool_project_fuse: pooling and scores of all encoders in one launch, then one GEMM that weighs and projects.

With MLP projectors the hidden layers run one GEMM an encoder and layer between the two; the last of them sums
the scores in its epilogue instead of the pooling. No encoder's projected tokens are ever formed.

Bytes, MERV in bf16, one video: 26.4 MB of maps, 7.3 MB of pooled tokens out and in again (the second time from
L2), 29.4 MB of matrices, 8.4 MB of result, where projecting, stacking and weighing one after another moves
about 335 MB. The score vectors a_e cost another pass over the matrices, unless they are remembered.

Scores are summed token by token, where the reference takes the mean of the tokens first: under an infinite matrix or
query infinities of both signs meet, and what is one infinite score there is NaN here, as it is where tokens are
projected before they are weighed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from merv_fast.kernels._gemm import is_dependent, project, project_weighed, score_chunks
from merv_fast.kernels._launch import Cost
from merv_fast.kernels._scoring import scoring
from merv_fast.kernels.pool_project import cost as pool_project_cost
from merv_fast.kernels.pool_project import token_buffers
from merv_fast.kernels.pool_tokens import pool
from merv_fast.remembered import Remembered

__all__ = ["cost", "launch"]


def launch(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    query: Tensor,
    bias: Tensor,
    grids: Sequence[int],
    out_grid: Sequence[int],
    out_slots: int,
) -> tuple[Tensor, Tensor]:
    """pool_project_fuse of ``xs[e] [B, T_e, H_e*W_e, C_e]``."""
    E, L = len(xs), len(weights) // len(xs)
    B, S = xs[0].shape[0], out_slots * out_grid[0] * out_grid[1]
    last, last_biases = weights[L - 1 :: L], biases[L - 1 :: L]
    score_vectors, offsets = remembered_scoring(last, last_biases, query, bias)
    tokens = token_buffers(B, S, xs)
    pairs = list(zip(grids[::2], grids[1::2], strict=True))
    dependents = is_dependent(B, S, weights[0].shape[0], weights[0].dtype, gelu=L > 1)
    if L == 1:
        sums, chunks = pool(xs, pairs, out_grid, out_slots, tokens, score_vectors, dependents=dependents)
    else:
        pool(xs, pairs, out_grid, out_slots, tokens, dependents=dependents)
        chunks = [score_chunks(B, S, w.shape[0], w.dtype) for w in weights[L - 2 :: L]]
        sums = torch.empty(B, E, max(chunks), dtype=torch.float32, device=query.device)
        for e in range(E):
            for layer in range(e * L, (e + 1) * L - 2):
                tokens[e] = project(tokens[e], weights[layer], biases[layer], gelu=True)
            hidden, score = (e + 1) * L - 2, (score_vectors[e], sums[:, e])
            tokens[e] = project(tokens[e], weights[hidden], biases[hidden], gelu=True, score=score)
    return project_weighed(tokens, last, last_biases, sums, chunks, offsets)


def remembered_scoring(
    weights: Sequence[Tensor], biases: Sequence[Tensor], query: Tensor, bias: Tensor
) -> tuple[list[Tensor], Tensor]:
    """`scoring` of the same tensors as before, if they have not been written to: reading P_e takes a pass over it.

    Only a query that comes again is looked for, so one that is made anew from its parameters at every call, as
    in training, costs nothing to remember.
    """
    tensors = [*weights, *biases, query, bias]
    return _SCORING.get(query, tensors, lambda: scoring(weights, query, biases, bias))


_SCORING = Remembered()
"""`scoring` by query."""


def cost(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    query: Tensor,
    bias: Tensor,
    grids: Sequence[int],
    out_grid: Sequence[int],
    out_slots: int,
) -> Cost:
    """pool_project of each encoder, but the result written once."""
    L, D = len(weights) // len(xs), query.shape[0]
    rows = xs[0].shape[0] * out_slots * out_grid[0] * out_grid[1]
    flops = moved = 0
    for e, x in enumerate(xs):
        own = slice(e * L, (e + 1) * L)
        one = pool_project_cost(x, weights[own], biases[own], grids[2 * e : 2 * e + 2], out_grid, out_slots)
        flops, moved = flops + one.flops, moved + one.bytes - rows * D * x.element_size()
    return Cost(flops, moved + rows * D * xs[0].element_size())
