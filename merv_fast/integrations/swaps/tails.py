"""A model's projectors and fusion as one op, where the algebra allows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from merv_fast import ops
from merv_fast.integrations.swaps.deferred import Deferred
from merv_fast.integrations.swaps.findings import Swap
from merv_fast.integrations.swaps.fusions import as_theirs, find_fusion, fuse, shared
from merv_fast.integrations.swaps.layers import tensors_of
from merv_fast.integrations.swaps.projectors import Pooling, pooling_of, project

__all__ = ["find_tail"]


def find_tail(model: nn.Module) -> dict[nn.Module, Swap]:
    """Swaps of the ``projectors`` and ``feature_fusion`` of a model that computes the second from the first.

    A projector then only says what it would compute. The fusion computes all of it at once; anybody else who looks at
    a projector's tokens gets them.
    """
    projectors, fusion = getattr(model, "projectors", None), getattr(model, "feature_fusion", None)
    if not (isinstance(projectors, nn.ModuleList) and isinstance(fusion, nn.Module)):
        return {}
    poolings = [pooling_of(projector) for projector in projectors]
    alone = find_fusion(fusion)
    if not isinstance(alone, Swap) or not alike(poolings):
        return {}
    why = f"the fusion of {len(projectors)} encoders commutes with pooling and the last linear layers"
    swaps = {projector: Swap(say, "pool_project_fuse", why) for projector in projectors}
    return swaps | {fusion: replace(alone, call=fuse_all, runs="pool_project_fuse", why=why)}


def alike(poolings: Sequence[Pooling | str | None]) -> bool:
    """Whether one op serves them all."""
    known = [each for each in poolings if isinstance(each, Pooling)]
    kinds = {(len(each.layers), each.out_grid, each.slots, each.over_slots) for each in known}
    return len(known) == len(poolings) and len(kinds) == 1 and bool(known[0].layers)


def say(module: nn.Module, x: Tensor) -> Tensor:
    """The tokens [B, S, D] of ``x`` [B, T, N, C], not computed yet."""
    pooling = pooling_of(module)
    if torch.compiler.is_compiling() or not isinstance(pooling, Pooling):
        return project(module, x)
    pooling.grid(x)
    rows, columns = pooling.out_grid
    shape = (len(x), pooling.slots * rows * columns, pooling.layers[-1].out_features)
    return Deferred(lambda: pooling(x), shape, x, made_of=(pooling, x))


def fuse_all(module: nn.Module, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens and weights, from what went into the projectors where nobody has looked at what came out."""
    said = [value.made_of for value in values if isinstance(value, Deferred) and value.made is None and value.made_of]
    if len(said) < len(values) or not alike([pooling for pooling, _ in said]):
        return fuse(module, values)
    return collapsed(module, said)


def collapsed(module: nn.Module, said: Sequence[tuple[Pooling, Tensor]]) -> Any:
    poolings, xs = zip(*said, strict=True)
    first = poolings[0]
    layers = [layer for pooling in poolings for layer in pooling.layers]
    weights, biases = tensors_of(layers)
    query, bias = shared(module, len(xs), layers[-1].out_features).folded(weights[0].dtype)
    grids = [pooling.grid(x) for pooling, x in said]
    slots = first.slots if first.over_slots else None
    return as_theirs(module, *ops.pool_project_fuse(xs, weights, biases, query, bias, grids, first.out_grid, slots))
