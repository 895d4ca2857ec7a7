"""transformers' ViViT: tubelets that attend to each other, everything after the last block and the norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from merv_fast.integrations.swaps.kinds import Kind, activation_of, config_of

__all__ = ["vivit"]


def vivit(module: Any) -> Kind | str | None:
    """How transformers' ``VivitModel`` encodes; why ours is another; None of another module."""
    shape: Any = getattr(module, "config", None)
    if not (hasattr(shape, "tubelet_size") and hasattr(module, "embeddings") and hasattr(module, "layernorm")):
        return None
    activation = activation_of(shape.hidden_act)
    if activation is None:
        return f"its activation is {shape.hidden_act}"
    if getattr(module, "pooler", None) is not None:
        return "it has a pooler"
    if shape.output_hidden_states or shape.output_attentions or not shape.return_dict:
        return "its configuration asks for more than the last hidden state, or for a tuple"
    frames, rows, columns = shape.tubelet_size
    if rows != columns or not shape.qkv_bias:
        return "its tubelets are not square, or its attention has no biases"
    config = config_of(
        module,
        shape,
        activation,
        family="vivit",
        patch=rows,
        depth=shape.num_hidden_layers,
        blocks=shape.num_hidden_layers,
        tokens="all",
        tubelet=frames,
        attention="joint",
        final_norm=True,
    )
    return Kind("ViViT of transformers", config, pixels, output, type(module).forward, module)


def pixels(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """``pixel_values [B, F, 3, S, S]``; whoever asks for more, or for it in another form, is given theirs."""
    videos = args[0] if args else kwargs.get("pixel_values")
    more = [name for name, value in kwargs.items() if name != "pixel_values" and value is not None]
    return videos if len(args) < 2 and not more else None


def output(tokens: Tensor) -> BaseModelOutputWithPooling:
    """``[B, 1, N, C]`` -> an output with ``last_hidden_state [B, N, C]``."""
    return BaseModelOutputWithPooling(last_hidden_state=tokens[:, 0])
