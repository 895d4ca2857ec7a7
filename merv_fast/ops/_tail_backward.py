"""The backward of pool_project_fuse, whose docstring has its formulas and names, from passes that kernels may make."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merv_fast.ops._hidden_layers import hidden_layers, hidden_layers_backward
from merv_fast.ops._tail_passes import add_outer, blend, dots, matrix_gradients, score_vectors
from merv_fast.ops.fuse_encoders import softmax_backward

__all__ = ["kernel_backward", "reference_backward"]

LEAST_TOKENS = 32
"""Of a video, for `matrix_gradients`: with fewer its passes take longer than the product that it saves."""


class Passes(NamedTuple):
    """Those of `_tail_passes`, or kernels that do the same; without ``matrix_gradients``, Z is always formed."""

    score_vectors: Callable[[list[Tensor], Tensor], list[Tensor]]
    dots: Callable[[list[Tensor], list[Tensor]], tuple[Tensor, Tensor]]
    blend: Callable[..., None]
    add_outer: Callable[[list[Tensor], list[Tensor], Tensor, list[Tensor]], Tensor]
    matrix_gradients: Callable[..., tuple[Tensor, Tensor, list[Tensor]]] | None = None


def reference_backward(*arguments: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    """All in PyTorch."""
    return backward(Passes(score_vectors, dots, blend, add_outer, matrix_gradients), *arguments)


def kernel_backward(*arguments: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    """With kernels for the passes over tokens and matrices."""
    from merv_fast.kernels import _blend, _outer, _scoring

    passes = Passes(lambda P, query: _scoring.scoring(P, query)[0], _blend.dots, _blend.blend, _outer.add_outer)
    return backward(passes, *arguments)


def backward(
    passes: Passes,
    grad_tokens: Tensor,
    grad_encoder_weights: Tensor,
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    query: Tensor,
    encoder_weights: Tensor,
    grids: list[int],
    out_grid: list[int],
    out_slots: int,
    needs_xs: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    """dw of every encoder first, as the softmax couples them, then encoder by encoder."""
    G, w, dtype, L = grad_tokens, encoder_weights, encoder_weights.dtype, len(weights) // len(xs)
    P, b = weights[L - 1 :: L], torch.stack(biases[L - 1 :: L]).to(dtype)
    q, G_sum = query.to(dtype), G.sum(1, dtype=dtype)
    own = [slice(e * L, (e + 1) * L - 1) for e in range(len(xs))]
    pooled = [
        torch.ops.merv_fast.pool_tokens.default(x, grids[2 * e : 2 * e + 2], out_grid, out_slots).flatten(1, 2)
        for e, x in enumerate(xs)
    ]
    hidden = [hidden_layers(pooled[e], weights[own[e]], biases[own[e]]) for e in range(len(xs))]
    needs_hidden = needs_xs or L > 1
    # In float16 matrix_gradients may overflow where w_e would have made the sums small enough.
    unfit = G.shape[1] < LEAST_TOKENS or G.dtype == torch.float16
    if passes.matrix_gradients is None or needs_hidden or unfit:
        Z = [G @ P_e for P_e in P]
        dw, means = passes.dots(Z, hidden)
        # In place: h becomes w h.
        passes.blend(w, values=hidden, weighed=hidden)
        rows = G.flatten(0, 1)
        dP = [rows.T @ h.flatten(0, 1) for h in hidden]
    else:
        dw, means, dP = passes.matrix_gradients(G, P, hidden, w)
    ds = softmax_backward(dw + G_sum @ b.T + grad_encoder_weights, w)

    weighed_means = [ds[:, e] @ mean for e, mean in enumerate(means.split([h.shape[2] for h in hidden], 1))]
    dquery = ds.sum(0) @ b + passes.add_outer(dP, P, query, weighed_means)
    db = [(w[:, e] @ G_sum + ds[:, e].sum() * q).to(G.dtype) for e in range(len(xs))]
    dxs, dweights, dbiases = [], dP, db
    if needs_hidden:
        # In place: Z becomes dh.
        passes.blend(w, grads=Z, ds=ds, vectors=passes.score_vectors(P, query), dvalues=Z)
        dweights, dbiases = [], []
        for e in range(len(xs)):
            dpooled, dW, db_hidden = hidden_layers_backward(Z[e], pooled[e], weights[own[e]], biases[own[e]], needs_xs)
            dweights += [*dW, dP[e]]
            dbiases += [*db_hidden, db[e]]
            if dpooled is not None:
                maps = dpooled.unflatten(1, (out_slots, -1))
                grid = grids[2 * e : 2 * e + 2]
                dxs.append(torch.ops.merv_fast.pool_tokens_backward.default(maps, grid, out_grid, xs[e].shape[1]))
    return dxs, dweights, dbiases, dquery.to(query.dtype), ds.sum(0).to(query.dtype)
