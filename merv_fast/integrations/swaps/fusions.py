"""The reference's fusions that weigh encoders: the cross-attention of one learned query, and learned weights."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from merv_fast.integrations.swaps.findings import Finding, Refusal, Swap
from merv_fast.modules.fusion import WeighingFusion

__all__ = ["as_theirs", "find_fusion", "shared"]

OURS = "_merv_fast_fusion"
"""Where a fusion keeps what weighs the encoders in its place."""


class SharedCrossAttention(WeighingFusion):
    """`CrossAttentionFusion` on the weights of the reference's ``CrossAttentionAdapterLearnableQuery``."""

    def __init__(self, theirs: Any, encoders: int, width: int) -> None:
        super().__init__(encoders)
        self.theirs = theirs

    def fold(self) -> tuple[Tensor, Tensor]:
        """As `CrossAttentionFusion.fold`."""
        attention, width = self.theirs.attention, self.theirs.Q.shape[1]
        packed = attention.in_proj_weight
        query_weight = attention.q_proj_weight if packed is None else packed[:width]
        key_weight = attention.k_proj_weight if packed is None else packed[width : 2 * width]
        query_bias, key_bias, _ = attention.in_proj_bias.chunk(3)
        q = linear(self.theirs.Q, query_weight, query_bias)[0] / sqrt(width)
        query, bias = q @ key_weight, (q @ key_bias).expand(self.encoders)
        return query, bias + self.theirs.pe @ query if self.theirs.positional_embedding else bias


class SharedScalar(WeighingFusion):
    """`ScalarFusion` on the weights of the reference's ``ScalarAdapter``."""

    def __init__(self, theirs: Any, encoders: int, width: int) -> None:
        super().__init__(encoders)
        self.theirs, self.width = theirs, width

    def fold(self) -> tuple[Tensor, Tensor]:
        """A query that no token matters to, and the scalars."""
        return self.theirs.scalar.new_zeros(self.width), self.theirs.scalar


def find_fusion(module: nn.Module) -> Finding | None:
    """The swap of a fusion that weighs encoders, by the parts that the reference's two have."""
    if isinstance(getattr(module, "scalar", None), nn.Parameter) and not list(module.children()):
        if module.scalar.ndim != 1 or len(list(module.parameters())) != 1:
            return None
        return Swap(fuse, "fuse_encoders", "a softmax over learned numbers", {OURS: {}})
    attention, query = getattr(module, "attention", None), getattr(module, "Q", None)
    if not (isinstance(attention, nn.MultiheadAttention) and isinstance(query, nn.Parameter)):
        return None
    if why := obstacle(module, attention):
        return Refusal(why)
    return Swap(fuse, "fuse_encoders", "one learned query, one head, of which the weights alone are used", {OURS: {}})


def obstacle(module: Any, attention: nn.MultiheadAttention) -> str | None:
    """Why an attention is not one that folds into a query and a bias."""
    if not module.averagetoken:
        return "its keys are all tokens in a row instead of their mean"
    if attention.num_heads != 1:
        return f"its attention has {attention.num_heads} heads instead of one"
    if attention.in_proj_bias is None or attention.bias_k is not None or attention.add_zero_attn:
        return "its attention has other biases than a projection's"
    if attention.dropout:
        return f"its attention drops {attention.dropout:g} of the weights in training"
    return None


def fuse(module: nn.Module, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens [B, S, D] and encoder weights, as the module returns them, of E encoders' [B, S, D] or [B, 1, D]."""
    length = getattr(module, "token_length", None)
    if length is not None and any(value.shape[1] not in (length, 1) for value in values):
        shapes = [list(value.shape) for value in values]
        raise ValueError(f"fusion: values must hold {length} tokens each, or one, got {shapes}")
    return as_theirs(module, *shared(module, len(values), values[0].shape[-1])(values))


def shared(module: nn.Module, encoders: int, width: int) -> WeighingFusion:
    """What weighs so many encoders, of tokens so wide, with the weights of ``module``."""
    kept: dict[tuple[int, int], WeighingFusion] = vars(module)[OURS]
    if (encoders, width) not in kept:
        scalars, positions = getattr(module, "scalar", None), getattr(module, "pe", None)
        # The reference's attention is told a number of encoders, but without positions it takes any.
        told = scalars if scalars is not None else positions
        if told is not None and len(told) != encoders:
            raise ValueError(f"fusion: values must be of {len(told)} encoders, got {encoders}")
        kind = SharedCrossAttention if scalars is None else SharedScalar
        kept[encoders, width] = kind(module, encoders, width)
    return kept[encoders, width]


def as_theirs(module: nn.Module, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Learned numbers are the same for all videos: the reference returns them once, [1, E]."""
    return tokens, weights[:1] if hasattr(module, "scalar") else weights
