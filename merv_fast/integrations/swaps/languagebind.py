"""The reference's LanguageBind backbone: CLIP's tower with temporal attention, the stream before its last block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from merv_fast.encoders.config import Tokens
from merv_fast.integrations.swaps.kinds import Kind, activation_of, config_of

__all__ = ["languagebind"]

TOKENS: dict[str | None, Tokens] = {
    None: "all",
    "average": "mean",
    "classemb": "class",
    "noclass": "grid",
    "classemb-at-first": "class-first",
}
"""The backbone's ``token`` -> ours."""


def languagebind(module: Any) -> Kind | str | None:
    """How the reference's ``LangBindVideoBackbone`` encodes; why ours is another; None of another module."""
    tower: Any = getattr(module, "featurizer", None)
    layers = getattr(getattr(tower, "encoder", None), "layers", None)
    if layers is None or not len(layers) or not hasattr(layers[0], "temporal_attn"):
        return None
    shape, token = tower.config, getattr(module, "token", None)
    activation = activation_of(shape.hidden_act)
    if activation is None:
        return f"its activation is {shape.hidden_act}"
    if token not in TOKENS:
        return f"its token is {token!r} instead of one of {', '.join(map(str, TOKENS))}"
    config = config_of(
        module,
        shape,
        activation,
        family="languagebind",
        patch=shape.patch_size,
        depth=len(layers),
        blocks=len(layers) - 1,
        tokens=TOKENS[token],
        temporal_window=shape.num_frames,
        embedding_norm=True,
    )
    return Kind("LanguageBind", config, frames, flat, type(module).forward, tower)


def frames(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """``video_values [B, 3, F, S, S]`` and ``is_image``, which nothing depends on."""
    videos = args[0] if args else kwargs.get("video_values")
    return videos.transpose(1, 2) if isinstance(videos, Tensor) else None


def flat(tokens: Tensor) -> Tensor:
    """``[B, T, N, C]`` -> ``[B, T * N, C]``."""
    return tokens.flatten(1, 2)
