"""Encoders that ours can stand for: whichever of the known kinds a module is, one swap."""

from __future__ import annotations

from torch import Tensor, nn

from merv_fast.integrations.swaps.findings import Finding, Refusal, Swap
from merv_fast.integrations.swaps.languagebind import languagebind
from merv_fast.integrations.swaps.shared_vit import SharedViT
from merv_fast.integrations.swaps.timm import timm_vit
from merv_fast.integrations.swaps.vivit import vivit

__all__ = ["find_encoder", "holder_of"]

KINDS = (timm_vit, languagebind, vivit)

ENCODER = "_merv_fast_encoder"
"""Where a module keeps what runs in its place."""


def find_encoder(module: nn.Module) -> Finding | None:
    """The swap of an encoder, or why one of a known kind is left as it is."""
    for look in KINDS:
        kind = look(module)
        if isinstance(kind, str):
            return Refusal(kind)
        if kind is not None:
            shared = SharedViT(kind.holder, kind.config)
            size = f"{kind.config.blocks} of {kind.config.depth} blocks of {kind.config.width}"
            return Swap(encode, "VisionTransformer", f"{kind.name}: {size}", {ENCODER: (shared, kind)})
    return None


def encode(module: nn.Module, *args: object, **kwargs: object) -> object:
    """What the module returns for these arguments, from our encoder; from the module itself where ours would not do."""
    shared, kind = vars(module)[ENCODER]
    pixels = None if shared.needs_theirs() else kind.pixels(args, kwargs)
    if not isinstance(pixels, Tensor):
        return kind.theirs(module, *args, **kwargs)
    return kind.returned(shared(pixels))


def holder_of(module: nn.Module) -> nn.Module | None:
    """The part with the weights of a module that runs our encoder, or None of another module."""
    return vars(module)[ENCODER][0].theirs if ENCODER in vars(module) else None
