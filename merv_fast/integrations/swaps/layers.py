"""The linear layers of an MLP that is written as in the reference, in prismatic or in LLaVA."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

__all__ = ["Layers", "find_layers", "tensors_of"]

Layers = list[nn.Linear]


def find_layers(module: nn.Module) -> Layers | str:
    """The linear layers of ``module`` in order, an exact GELU between each two; or why it is something else.

    An identity has none. What only holds one part, such as the reference's ``LinearProjector`` around its linear layer,
    is that part; an identity beside it, such as a LayerNorm that is switched off, changes nothing.
    """
    if isinstance(module, nn.Identity):
        return []
    if isinstance(module, nn.Linear):
        return (
            [module] if type(module) is nn.Linear and module.bias is not None else f"{named(module)} is no plain layer"
        )
    parts = [child for child in module.children() if not isinstance(child, nn.Identity)]
    if type(module) is nn.Sequential:
        return alternating(parts)
    if len(parts) != 1:
        return f"{named(module)} holds {', '.join(map(named, parts)) or 'nothing'} instead of an MLP alone"
    return find_layers(parts[0])


def alternating(parts: Sequence[nn.Module]) -> Layers | str:
    """The layers of ``linear, GELU, linear, ...``."""
    layers: Layers = []
    for place, part in enumerate(parts):
        if place % 2:
            if not isinstance(part, nn.GELU) or part.approximate != "none":
                return f"{part} stands between two layers instead of an exact GELU"
        elif type(part) is not nn.Linear or part.bias is None:
            return f"{part} stands where a linear layer with a bias would"
        else:
            layers.append(part)
    return layers if len(parts) % 2 else f"{parts[-1] if parts else 'nothing'} comes last instead of a linear layer"


def tensors_of(layers: Layers) -> tuple[list, list]:
    """Weights and biases, as the ops take them."""
    return [layer.weight for layer in layers], [layer.bias for layer in layers]


def named(module: nn.Module) -> str:
    return type(module).__name__
