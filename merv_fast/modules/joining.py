"""Fusions that place the encoders' tokens or channels side by side, and what every fusion has in common."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["ChannelConcatFusion", "ConcatFusion", "FirstFusion", "Fusion", "MixedFusion"]


class Fusion(nn.Module):
    """``values``, E tensors ``[B, S_e, D]``, to ``(tokens [B, S, D], encoder_weights [B, E] | None)``."""

    op = "torch"

    def __init__(self, encoders: int) -> None:
        super().__init__()
        self.encoders = encoders

    def output_tokens(self, tokens_per_encoder: Sequence[int]) -> int:
        """S of given S_e; ``ValueError`` if this fusion cannot join them."""
        self.check_encoders(tokens_per_encoder)
        if len(set(tokens_per_encoder)) > 1:
            raise ValueError(f"{type(self).__name__}: tokens_per_encoder must be equal, got {list(tokens_per_encoder)}")
        return tokens_per_encoder[0]

    def check_encoders(self, items: Sequence[object]) -> None:
        """Raise ``ValueError`` unless there is one item an encoder."""
        if len(items) != self.encoders:
            raise ValueError(f"{type(self).__name__}: encoders must be {self.encoders}, got {len(items)}")

    def forward(self, values: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """See the class."""
        raise NotImplementedError


class ConcatFusion(Fusion):
    """All tokens of the first encoder, then all of the second, and so on: ``S = sum_e S_e``."""

    def output_tokens(self, tokens_per_encoder: Sequence[int]) -> int:
        """The sum of S_e."""
        self.check_encoders(tokens_per_encoder)
        return sum(tokens_per_encoder)

    def forward(self, values: Sequence[Tensor]) -> tuple[Tensor, None]:
        """``values``, E tensors ``[B, S_e, D]``, to ``[B, sum(S_e), D]``."""
        self.check_encoders(values)
        return torch.cat(list(values), dim=1), None


class ChannelConcatFusion(Fusion):
    """Concatenate the channels of equally many tokens, perhaps LayerNorm, then linear ``E*D -> D``.

    State-dict names are the reference's: ``projector.*``, or ``0.*`` and ``1.projector.*`` with the norm.
    """

    def __init__(self, encoders: int, llm_width: int, layer_norm: bool = False) -> None:
        super().__init__(encoders)
        width = encoders * llm_width
        mixer = nn.ModuleDict({"projector": nn.Linear(width, llm_width)})
        modules = {"0": nn.LayerNorm(width), "1": mixer} if layer_norm else mixer
        for name, module in modules.items():
            self.add_module(name, module)
        self.layers = ("0", "1.projector") if layer_norm else ("projector",)

    def forward(self, values: Sequence[Tensor]) -> tuple[Tensor, None]:
        """``values``, E tensors ``[B, S, D]``, to ``[B, S, D]``."""
        self.output_tokens([value.shape[1] for value in values])
        x = torch.cat(list(values), dim=-1)
        for layer in self.layers:
            x = self.get_submodule(layer)(x)
        return x, None


class MixedFusion(Fusion):
    """An equal share of the tokens from each encoder, a quarter from each of four, joined along the sequence.

    The poster's "25%-Mixed" is not in the released code; this is our reading of it. The shares are spread
    evenly over the sequence: encoder e of E gives its tokens e, e + E, e + 2E ..., so that together they
    cover every position once, ``S`` tokens in all, those of the first encoder first.
    """

    def forward(self, values: Sequence[Tensor]) -> tuple[Tensor, None]:
        """``values``, E tensors ``[B, S, D]``, to ``[B, S, D]``."""
        self.output_tokens([value.shape[1] for value in values])
        shares = [value[:, index :: self.encoders] for index, value in enumerate(values)]
        return torch.cat(shares, dim=1), None


class FirstFusion(Fusion):
    """The first encoder's tokens; the others are ignored."""

    def output_tokens(self, tokens_per_encoder: Sequence[int]) -> int:
        """The first S_e."""
        self.check_encoders(tokens_per_encoder)
        return tokens_per_encoder[0]

    def forward(self, values: Sequence[Tensor]) -> tuple[Tensor, None]:
        """``values``, E tensors ``[B, S_e, D]``, to ``[B, S_0, D]``."""
        self.check_encoders(values)
        return values[0], None
