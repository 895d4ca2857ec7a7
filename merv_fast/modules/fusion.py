"""Joining the projected tokens of the encoders: one module for every ``feature_fusion`` of the reference."""

from merv_fast.modules.joining import ChannelConcatFusion, ConcatFusion, FirstFusion, Fusion, MixedFusion
from merv_fast.modules.weighing import (
    CrossAttentionFusion,
    ScalarFusion,
    WeighingFusion,
    convert_fusion_state_dict,
)

__all__ = [
    "ChannelConcatFusion",
    "ConcatFusion",
    "CrossAttentionFusion",
    "FirstFusion",
    "Fusion",
    "MixedFusion",
    "ScalarFusion",
    "WeighingFusion",
    "build_fusion",
    "convert_fusion_state_dict",
]

FUSIONS = (
    "cross_attention_avg_lq",
    "concat",
    "concat_channel",
    "concat_channel_ln",
    "scalar",
    "mixed25",
    "first",
)


def build_fusion(
    feature_fusion: str,
    encoders: int,
    llm_width: int,
    query_width: int = 3072,
    positional_embedding: bool = False,
) -> Fusion:
    """The fusion the reference builds for ``feature_fusion``, ``E x [B, S_e, D] -> [B, S, D]``.

    | ``feature_fusion`` | module | poster |
    |---|---|---|
    | ``cross_attention_avg_lq`` | `CrossAttentionFusion` | Cross-Attn |
    | ``concat`` | `ConcatFusion` | Concat (Seq.) |
    | ``concat_channel``, ``concat_channel_ln`` | `ChannelConcatFusion` | Concat (Ch.) |
    | ``scalar`` | `ScalarFusion` | Learnable W |
    | ``mixed25`` | `MixedFusion` | 25%-Mixed |
    | ``first`` | `FirstFusion` | one encoder |

    ``query_width`` and ``positional_embedding`` are the cross-attention's. Raises ``ValueError`` for an
    unknown ``feature_fusion``, fewer than one encoder, or a positional embedding where nothing has keys.

    >>> import torch
    >>> fusion = build_fusion("scalar", encoders=2, llm_width=8)
    >>> tokens, encoder_weights = fusion([torch.zeros(3, 5, 8), torch.zeros(3, 5, 8)])
    >>> tokens.shape, encoder_weights.shape
    (torch.Size([3, 5, 8]), torch.Size([3, 2]))
    """
    if feature_fusion not in FUSIONS:
        choices = ", ".join(FUSIONS)
        raise ValueError(f"build_fusion: feature_fusion must be one of {choices}, got {feature_fusion!r}")
    if encoders < 1:
        raise ValueError(f"build_fusion: encoders must be at least 1, got {encoders}")
    if feature_fusion == "cross_attention_avg_lq":
        return CrossAttentionFusion(encoders, llm_width, query_width, positional_embedding)
    if positional_embedding:
        raise ValueError(f"build_fusion: positional_embedding must be False for {feature_fusion}, got True")
    if feature_fusion.startswith("concat_channel"):
        return ChannelConcatFusion(encoders, llm_width, layer_norm=feature_fusion.endswith("_ln"))
    if feature_fusion == "scalar":
        return ScalarFusion(encoders, llm_width)
    plain: dict[str, type[Fusion]] = {"concat": ConcatFusion, "mixed25": MixedFusion, "first": FirstFusion}
    return plain[feature_fusion](encoders)
