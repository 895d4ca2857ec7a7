"""What several ops ask of their arguments, said as ``op: argument must be <rule>, got <value>``."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "check_alike",
    "check_count",
    "check_encoder_count",
    "check_encoder_weighing",
    "check_floating",
    "check_grid",
    "check_layers",
    "check_maps",
]

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MOST_ENCODERS = 8


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """Raise TypeError unless ``tensor`` has one of the four floating dtypes the ops compute in."""
    if tensor.dtype not in _FLOATING:
        raise TypeError(f"{op}: {name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")


def check_alike(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless ``tensor`` has the dtype (TypeError) and lies on the device (ValueError) of ``like``."""
    if tensor.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must be {like.dtype} like {like_name}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} like {like_name}, got {tensor.device}")


def check_count(op: str, name: str, count: int) -> None:
    """Raise ValueError unless ``count`` is at least 1."""
    if count < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {count}")


def check_grid(op: str, name: str, grid: Sequence[int]) -> None:
    """Raise ValueError unless ``grid`` is (rows, columns), both at least 1."""
    if len(grid) != 2 or grid[0] < 1 or grid[1] < 1:
        raise ValueError(f"{op}: {name} must be (rows, columns), both at least 1, got {tuple(grid)}")


def check_maps(op: str, name: str, x: Tensor, grid_name: str, grid: Sequence[int]) -> None:
    """Raise unless ``x`` holds floating feature maps ``[B, T, H*W, C]`` of the token grid ``grid``."""
    check_floating(op, name, x)
    check_grid(op, grid_name, grid)
    if x.ndim != 4:
        raise ValueError(f"{op}: {name} must be [B, T, H*W, C], got shape {tuple(x.shape)}")
    if x.shape[1] < 1 or x.shape[3] < 1:
        raise ValueError(f"{op}: {name} must have at least one slot and channel, got shape {tuple(x.shape)}")
    if x.shape[2] != grid[0] * grid[1]:
        rule = f"{grid[0] * grid[1]} tokens a slot for {grid_name} {tuple(grid)}"
        raise ValueError(f"{op}: {name} must hold {rule}, got {x.shape[2]}")


def check_layers(
    op: str, x_name: str, x: Tensor, first: int, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> None:
    """Raise unless the layers, numbered from ``first`` in messages, chain from the width of ``x``."""
    width = x.shape[-1]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=first):
        check_alike(op, f"weights[{layer}]", weight, x_name, x)
        check_alike(op, f"biases[{layer}]", bias, x_name, x)
        if weight.ndim != 2 or weight.shape[1] != width:
            raise ValueError(f"{op}: weights[{layer}] must be [out, {width}], got shape {tuple(weight.shape)}")
        if not weight.shape[0]:
            raise ValueError(f"{op}: weights[{layer}] must have at least one row, got shape {tuple(weight.shape)}")
        width = weight.shape[0]
        if bias.ndim != 1 or bias.shape[0] != width:
            raise ValueError(f"{op}: biases[{layer}] must be [{width}], got shape {tuple(bias.shape)}")


def check_encoder_weighing(op: str, name: str, tensors: Sequence[Tensor], D: int, query: Tensor, bias: Tensor) -> None:
    """Raise unless ``query [D]`` and ``bias [E]`` fit the encoders' ``tensors``, whose dtype they share."""
    E = len(tensors)
    check_alike(op, "query", query, f"{name}[0]", tensors[0])
    check_alike(op, "bias", bias, f"{name}[0]", tensors[0])
    if query.ndim != 1 or query.shape[0] != D:
        raise ValueError(f"{op}: query must be [{D}], got shape {tuple(query.shape)}")
    if bias.ndim != 1 or bias.shape[0] != E:
        raise ValueError(f"{op}: bias must be [{E}], got shape {tuple(bias.shape)}")


def check_encoder_count(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    """Raise ValueError unless ``tensors`` are those of 1 to 8 encoders."""
    if not 1 <= len(tensors) <= _MOST_ENCODERS:
        raise ValueError(f"{op}: {name} must be tensors of 1 to {_MOST_ENCODERS} encoders, got {len(tensors)}")
