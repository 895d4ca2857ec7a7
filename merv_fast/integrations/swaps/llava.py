"""LLaVA's ``get_2dPool`` after ``mm_projector``: pooling and projection as one op."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from merv_fast import ops
from merv_fast.integrations.swaps.deferred import Deferred
from merv_fast.integrations.swaps.findings import Finding, Refusal, Swap
from merv_fast.integrations.swaps.layers import Layers, find_layers, tensors_of

__all__ = ["find_llava"]

STRIDE = "_merv_fast_stride"
"""Where a model keeps the stride at which its ``get_2dPool`` pools if not told."""


def find_llava(model: Any) -> dict[nn.Module, Finding]:
    """What to do with a model that has ``get_2dPool`` and, in ``get_model()``, an ``mm_projector``.

    Pooling commutes with the projector's last linear layer. So the projector says what it would compute, and
    ``get_2dPool`` pools before that layer, which then takes a fourth of the tokens at a stride of 2.
    """
    if not (callable(getattr(model, "get_2dPool", None)) and callable(getattr(model, "get_model", None))):
        return {}
    projector = getattr(model.get_model(), "mm_projector", None)
    if not isinstance(projector, nn.Module):
        return {}
    layers = find_layers(projector)
    mode, stride = mode_of(model), inspect.signature(type(model).get_2dPool).parameters.get("stride")
    if isinstance(layers, str) or not layers:
        return {projector: Refusal(layers if isinstance(layers, str) else "it has no linear layer")}
    if mode != "average":
        return {projector: Refusal(f"mm_spatial_pool_mode is {mode!r}; only 'average' commutes with a linear layer")}
    if stride is None or not isinstance(stride.default, int):
        return {projector: Refusal("get_2dPool takes no stride")}
    why = f"average pooling commutes with the last of {len(layers)} linear layer(s)"
    return {
        projector: Swap(say, "pool_project, within get_2dPool", why),
        model: Swap(pool, "pool_project", why, {STRIDE: stride.default}, method="get_2dPool"),
    }


def mode_of(model: Any) -> Any:
    """How LLaVA's configuration says that tokens are pooled."""
    return getattr(model.config, "mm_spatial_pool_mode", None)


def say(module: nn.Module, x: Tensor) -> Tensor:
    """The projected tokens [frames, N, D] of ``x`` [frames, N, C], not computed yet."""
    layers = find_layers(module)
    if isinstance(layers, str):
        raise RuntimeError(f"mm_projector: must still be the one that was accelerated, got {module}")
    return mlp(x, layers) if torch.compiler.is_compiling() or x.ndim != 3 else rows_of(x, layers)


def rows_of(x: Tensor, layers: Layers) -> Rows:
    """What the layers make of ``x`` [frames, N, C], not computed yet."""
    return Rows(lambda: mlp(x, layers), (*x.shape[:-1], layers[-1].out_features), x, (layers, x))


class Rows(Deferred):
    """Frames that are projected each by itself: a part of them is what the same part of the input becomes."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_frame = not any((kwargs or {}).values())
        if func in (torch.split, Tensor.split) and len(args) == 2 and by_frame and cls.untouched(args[0]):
            layers, x = args[0].made_of
            return tuple(rows_of(piece, layers) for piece in torch.split(x, args[1]))
        return super().__torch_function__(func, types, args, kwargs)

    @staticmethod
    def untouched(tensor: Tensor) -> bool:
        """Whether nobody has looked at the values yet."""
        return isinstance(tensor, Rows) and tensor.made is None


def pool(model: Any, image_feature: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """[frames, N, D] to [frames, h * w, D], as ``get_2dPool`` does; of what ``mm_projector`` says, all at once."""
    stride = args[0] if args else kwargs.get("stride", vars(model)[STRIDE])
    side = isqrt(image_feature.shape[1])
    fits = side * side == image_feature.shape[1] and side >= stride
    if not (Rows.untouched(image_feature) and mode_of(model) == "average" and fits):
        return type(model).get_2dPool(model, image_feature, *args, **kwargs)
    layers, x = image_feature.made_of  # type: ignore[attr-defined]
    return pool_and_project(x, layers, side, stride)


def pool_and_project(x: Tensor, layers: Layers, side: int, stride: int) -> Tensor:
    """What the layers make of ``x`` [frames, side * side, C], averaged over squares of ``stride`` tokens."""
    out = side // stride
    kept = out * stride
    x = mlp(x, layers[:-1]) if len(layers) == 1 else gelu(mlp(x, layers[:-1]))
    # As avg_pool2d has it, rows and columns that fill no square are left out.
    x = x.unflatten(1, (side, side))[:, :kept, :kept].flatten(1, 2)
    return ops.pool_project(x[:, None], *tensors_of(layers[-1:]), (kept, kept), (out, out))


def mlp(x: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    """The layers, an exact GELU between each two."""
    for place, layer in enumerate(layers):
        x = linear(gelu(x) if place else x, layer.weight, layer.bias)
    return x
