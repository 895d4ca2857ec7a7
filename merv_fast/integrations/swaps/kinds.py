"""What there is to know of a kind of encoder to let ours stand for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from merv_fast.encoders import EncoderConfig
from merv_fast.video.prepare import Recipe

__all__ = ["Kind", "activation_of", "config_of", "recipe"]

Activation = Literal["gelu", "gelu_tanh"]


@dataclass(frozen=True)
class Kind:
    """How a module encodes.

    Args:
        name: for people to read.
        config: of ours.
        pixels: from the arguments of its forward to ours, ``[B, F, 3, S, S]``; None if they ask for what ours has not.
        returned: from our tokens ``[B, T, N, C]`` to what its forward returns.
        theirs: its own forward.
        holder: the part of it that has the weights.
    """

    name: str
    config: EncoderConfig
    pixels: Callable[[tuple[Any, ...], Mapping[str, Any]], Tensor | None]
    returned: Callable[[Tensor], Any]
    theirs: Callable[..., Any]
    holder: nn.Module


def config_of(module: nn.Module, shape: Any, activation: Activation, **more: Any) -> EncoderConfig:
    """Ours of a module that has a configuration with the names of transformers, ``shape``."""
    return EncoderConfig(
        name=type(module).__name__,
        source="",
        files=(),
        recipe=recipe(shape.image_size),
        image_size=shape.image_size,
        num_frames=shape.num_frames,
        width=shape.hidden_size,
        heads=shape.num_attention_heads,
        mlp_width=shape.intermediate_size,
        activation=activation,
        eps=shape.layer_norm_eps,
        **more,
    )


def recipe(size: int) -> Recipe:
    """Of an encoder whose frames somebody else prepares: nothing but their size."""
    return Recipe(size, size, "resize-naive", "bicubic", True, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def activation_of(name: str) -> Activation | None:
    """Ours of transformers' names, or None."""
    tanh = ("gelu_fast", "gelu_new", "gelu_pytorch_tanh")
    return "gelu_tanh" if name in tanh else "gelu" if name == "gelu" else None
