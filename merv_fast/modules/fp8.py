"""Linear layers in 8-bit floating point: weights and inputs scaled row by row, products summed in float32.

    y = ((x / a) (w / b)^T) * a * b^T + bias      a [M, 1], b [N, 1]: largest magnitude of each row over 448

``x / a`` and ``w / b`` are rounded to ``float8_e4m3fn``, whose largest number is 448. Source: Micikevicius et al., "FP8
Formats for Deep Learning", arXiv 2209.05433. The product is PyTorch's (cuBLAS and CUTLASS on a GPU from sm_89 on).
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

__all__ = ["FP8", "Fp8Linear", "to_fp8"]

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
MULTIPLE = 16
"""Of which both sizes of a product in 8 bits must be multiples."""


class Fp8Linear(nn.Module):
    """A linear layer for inference, made by `to_fp8`.

    It keeps its 8 bits when the model around it is cast. On a GPU it takes bfloat16.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = rounded(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def extra_repr(self) -> str:
        """Sizes, as of `torch.nn.Linear`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]`` -> ``[..., out_features]`` in its dtype.

        Raises:
            ValueError: ``x`` wants a gradient, or has another dtype than bfloat16 or, on a CPU, float32.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("Fp8Linear: x must not want gradients (8-bit layers are for inference), got one that does")
        taken = (torch.bfloat16,) if x.device.type == "cuda" else (torch.bfloat16, torch.float32)
        if x.dtype not in taken:
            raise ValueError(f"Fp8Linear: x must be bfloat16 (or, on a CPU, float32), got {x.dtype} on {x.device}")
        if not x.numel():
            # PyTorch refuses a product of no rows.
            return x.new_empty(*x.shape[:-1], self.out_features)
        rows, scale = rounded(x.reshape(-1, self.in_features))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = torch._scaled_mm(rows, self.weight.t(), scale_a=scale, scale_b=self.scale.t(), bias=bias, out_dtype=x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as any module; casts leave weight and scale as they are."""
        weight, scale = self.weight, self.scale
        super()._apply(fn, recurse)
        if self.weight.dtype != FP8 or self.scale.dtype != torch.float32:
            self.weight, self.scale = weight.to(self.weight.device), scale.to(self.weight.device)
        return self


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [M, K]`` in 8 bits and the scale ``[M, 1]``, float32, that gives its rows back; rows of zeros stay so."""
    wide = x.float()
    scale = wide.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return (wide / scale).to(FP8), scale


def to_fp8(module: nn.Module, layers: Sequence[str] = ("qkv", "proj", "fc1", "fc2")) -> list[str]:
    """Replace linear layers of an encoder, or of several, by `Fp8Linear`, for inference alone.

    Args:
        module: changed in place. Its weights go from 16 bits to 8; it can no longer be trained, and a checkpoint saved
            of it holds the 8-bit weights under the same names.
        layers: names of those that are replaced, wherever they are; the default are those of all transformer blocks.

    Returns:
        The replaced layers' names.

    Raises:
        ValueError: there is none, or one has sizes that are no multiples of 16, or its device has no such products.
            Nothing is replaced then.

    >>> from merv_fast.encoders import build_encoder, encoder_config
    >>> with torch.device("meta"):
    ...     encoder = build_encoder(encoder_config("dinov2-video-all-tokens", 16))
    >>> len(to_fp8(encoder))
    92
    """
    found = [
        (name, parent, child, layer)
        for name, parent in module.named_modules()
        for child, layer in parent.named_children()
        if child in layers and isinstance(layer, nn.Linear)
    ]
    if not found:
        raise ValueError(f"to_fp8: module must hold linear layers named {', '.join(layers)}, got none")
    for name, _, child, layer in found:
        check(f"{name}.{child}".lstrip("."), layer)
    for _, parent, child, layer in found:
        setattr(parent, child, Fp8Linear(layer).train(layer.training))
    return [f"{name}.{child}".lstrip(".") for name, _, child, _ in found]


def check(name: str, layer: nn.Linear) -> None:
    """Raise unless the layer can be replaced."""
    sizes = layer.in_features, layer.out_features
    if any(size % MULTIPLE for size in sizes):
        raise ValueError(f"to_fp8: sizes of {name} must be multiples of {MULTIPLE}, got {sizes[0]} and {sizes[1]}")
    device: Any = layer.weight.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        raise ValueError(f"to_fp8: {name} must be on a GPU of sm_89 or later, got sm_{major}{minor}")
