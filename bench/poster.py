"""The two FLOPs tables of MERV's poster (ICML 2025, arXiv 2501.01426), counted from merv_fast's modules at full size.

Everything is on the ``meta`` device, LLaMA-2-7B included. A product of n x k and k x m numbers is n * k * m MACs, also
where a causal mask throws half of it away; norms, activations, sums and pooling are no products.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.baselines import ReferenceTail
from bench.counting import Count, count, parameters
from merv_fast.encoders import EncoderConfig, build_encoder
from merv_fast.models.configuration import MervConfig
from merv_fast.models.modeling import MervForConditionalGeneration
from merv_fast.models.video_model import MervVideoModel
from merv_fast.modules import Tail, build_fusion, build_projector
from merv_fast.modules.projectors import AttentivePooler

__all__ = [
    "FUSIONS",
    "PROJECTORS",
    "TEXT_DEVIATION",
    "TEXT_TOKENS",
    "Encoder",
    "FusionRow",
    "Model",
    "Projector",
    "ProjectorRow",
    "Strategy",
    "count_encoder",
    "count_llm",
    "count_model",
    "count_projector",
]

TEXT_TOKENS, TEXT_DEVIATION = 886.7, 9.5
"""Mean and standard deviation of the tokens of the poster's prompt, the beginning-of-sequence token included.

The reference's counter (``merv/util/flops_utils.py``) draws 1024 characters anew for each count, from letters, digits,
punctuation and the space; LLaMA-2's tokenizer made so many tokens of them over 20,000 draws. That tokenizer comes under
the model's licence and not with this project, so these two are constants. Its vocabulary in llama-tokenizer-js 1.2.2
gave 886.8 and 9.5 over another 20,000 draws.
"""

ATTENTION_SEEN = ("languagebind", "vivit")
"""Encoders whose attention the poster's counter (calflops 0.0.2) sees, as the reference writes it as matrix products;
it passes over the scaled_dot_product_attention of the other two."""

PROJECTOR_WIDTH, PROJECTOR_GRID, PROJECTOR_TOKENS = 1024, (16, 16), 64
"""Of the one encoder in the poster's first table, and the tokens that are left of each frame."""


@dataclass(frozen=True)
class ProjectorRow:
    """A row of the poster's first table: a resampler alone, without the linear layer after it.

    ``params`` and ``flops`` are as the poster prints them; ``unit`` is the field of `Count` that explains ``flops``.
    """

    name: str
    resampler: str
    frames: int
    out_width: int
    params: str
    flops: str
    unit: Literal["linear", "pooled"]
    convention: str


PROJECTORS = (
    ProjectorRow("2D Avg", "avg", 8, 1024, "0", "2.1M", "pooled", "input elements"),
    ProjectorRow("2D Avg*", "avg", 16, 1024, "0", "4.2M", "pooled", "input elements"),
    ProjectorRow("2D Attn", "attntv", 8, 1024, "12.7M", "9.7G", "linear", "MACs of its linear layers alone"),
    ProjectorRow("2D Conv", "conv", 8, 4096, "237M", "241G", "linear", "MACs, all of convolutions"),
    ProjectorRow("3D Avg*", "3davg", 16, 1024, "0", "4.2M", "pooled", "input elements"),
    ProjectorRow("3D Conv", "3dconv", 8, 4096, "113M", "232G", "linear", "MACs, all of the convolution"),
)
"""That the asterisk means 16 frames is inferred from the factor of exactly two."""


@dataclass(frozen=True)
class FusionRow:
    """A row of the poster's second table: the whole model once, ``poster`` in MACs.

    ``llm_attention`` tells whether the products inside the language model's attention are in the poster's number. This
    is inferred: no other choice brings all five rows within two standard deviations of the random text.
    """

    name: str
    feature_fusion: str
    poster: float
    llm_attention: bool


FUSIONS = (
    FusionRow("Cross-Attn", "cross_attention_avg_lq", 17.19e12, True),
    FusionRow("Concat (Seq.)", "concat", 43.09e12, True),
    FusionRow("Concat (Ch.)", "concat_channel", 16.29e12, False),
    FusionRow("Learnable W", "scalar", 16.24e12, False),
    FusionRow("25%-Mixed", "mixed25", 16.39e12, False),
)


class Projector(NamedTuple):
    """A resampler: its parameters, its count as the reference runs it, and as merv_fast does."""

    params: int
    reference: Count
    merv_fast: Count


class Encoder(NamedTuple):
    """An encoder with every block of its checkpoint, as the reference runs it, and with those alone that are used."""

    params: int
    reference: Count
    merv_fast: Count

    def seen(self, name: str) -> int:
        """MACs in the eyes of the poster's counter."""
        return self.reference.macs if name in ATTENTION_SEEN else self.reference.linear


@dataclass(frozen=True)
class Strategy:
    """What depends on the fusion.

    Args:
        row: of the poster.
        visual_tokens: that enter the language model.
        params: of the fusion as in the reference's checkpoints.
        used_params: of those, what merv_fast holds because it matters.
        fusion: the reference's way, from projected tokens on.
        tail: projectors and fusion together, as merv_fast runs them.
        folding: what the first call of ``tail`` needs beside it, once until a parameter changes.
        llm: the language model and its head over visual tokens and ``TEXT_TOKENS``.
        llm_token: what one more token adds to that.
    """

    row: FusionRow
    visual_tokens: int
    params: int
    used_params: int
    fusion: Count
    tail: Count
    folding: Count
    llm: Count
    llm_token: Count

    @property
    def noise(self) -> float:
        """Standard deviation, in MACs, that the length of the text gives to the poster's number."""
        token = self.llm_token.macs if self.row.llm_attention else self.llm_token.linear
        return token * TEXT_DEVIATION


@dataclass(frozen=True)
class Model:
    """Every part of merv-base, and of it with each other fusion instead of its own.

    ``gemm`` is the product of all last layers at once: visual tokens, channels of all encoders, the LLM's width.
    """

    encoders: Mapping[str, Encoder]
    projector_params: Sequence[int]
    projectors: Count
    gemm: tuple[int, int, int]
    strategies: Sequence[Strategy]
    llm_params: int

    def poster_parts(self, strategy: Strategy) -> dict[str, int]:
        """MACs of each part as the poster counts them."""
        return {name: encoder.seen(name) for name, encoder in self.encoders.items()} | {
            "projectors": self.projectors.macs,
            "fusion": strategy.fusion.macs,
            "llm": strategy.llm.linear,
            "llm_attention": strategy.llm.attention if strategy.row.llm_attention else 0,
        }

    def alike(self, strategy: Strategy) -> dict[str, int]:
        """MACs of the whole by four rules, each the same for all strategies."""
        parts = self.poster_parts(strategy)
        without = sum(parts.values()) - parts["llm_attention"]
        encoders = [encoder.reference.macs for encoder in self.encoders.values()]
        used = [encoder.merv_fast.macs for encoder in self.encoders.values()]
        return {
            "without_llm_attention": without,
            "with_llm_attention": without + strategy.llm.attention,
            "every_product": sum(encoders) + self.projectors.macs + strategy.fusion.macs + strategy.llm.macs,
            "merv_fast": sum(used) + strategy.tail.macs + strategy.llm.macs,
        }


def count_projector(row: ProjectorRow) -> Projector:
    """One row of the first table."""
    height, width = PROJECTOR_GRID
    specifier = f"{row.resampler}+none"
    with torch.device("meta"):
        projector = build_projector(
            specifier, PROJECTOR_WIDTH, row.out_width, PROJECTOR_TOKENS, row.frames, PROJECTOR_GRID
        )
    x = torch.empty(1, row.frames, height * width, PROJECTOR_WIDTH, device="meta")
    _, ours = count(projector, x)
    theirs = ours
    if isinstance(projector, AttentivePooler):
        # The reference repeats the queries for every frame, then projects them; ours projects them once.
        queries = projector.query_tokens.expand(row.frames, -1, -1)
        _, theirs = count(projector.cross_attn, queries, x[0])
    return Projector(parameters(projector), theirs, ours)


def count_model() -> Model:
    """The model of the second table."""
    with torch.device("meta"):
        model = MervForConditionalGeneration(MervConfig())
    video, projectors = model.video_model, model.video_model.tail.projectors
    encoded = {name: count_encoder(config) for name, config in video.encoder_configs.items()}
    features = [feature for feature, _ in encoded.values()]
    projected = [count(projector, x) for projector, x in zip(projectors, features, strict=True)]
    values, needs = [value for value, _ in projected], sum((one for _, one in projected), Count())
    return Model(
        encoders={name: encoder for name, (_, encoder) in encoded.items()},
        projector_params=[parameters(projector) for projector in projectors],
        projectors=needs,
        gemm=(values[0].shape[1], sum(feature.shape[3] for feature in features), values[0].shape[2]),
        strategies=[count_strategy(row, video, model.language_model, features, values, needs) for row in FUSIONS],
        llm_params=parameters(model.language_model),
    )


def count_encoder(config: EncoderConfig) -> tuple[Tensor, Encoder]:
    """The tokens of one video, and what they need."""
    with torch.device("meta"):
        used, whole = build_encoder(config), build_encoder(replace(config, blocks=config.depth))
    pixels = torch.empty(1, config.num_frames, 3, config.image_size, config.image_size, device="meta")
    tokens, ours = count(used, pixels)
    return tokens, Encoder(parameters(whole), count(whole, pixels)[1], ours)


def count_strategy(
    row: FusionRow,
    video: MervVideoModel,
    llm: PreTrainedModel,
    features: Sequence[Tensor],
    values: Sequence[Tensor],
    projectors: Count,
) -> Strategy:
    """One row of the second table, on the ``features`` of the encoders and the ``values`` that are projected."""
    with torch.device("meta"):
        fusion = build_fusion(row.feature_fusion, len(values), values[0].shape[2])
    tail = Tail(list(video.tail.projectors), fusion)
    _, first = count(tail, features)
    (tokens, _), again = count(tail, features)
    if row.feature_fusion == "cross_attention_avg_lq":
        params, theirs = count_reference(features, values[0].shape[2], projectors)
    else:
        params, (_, theirs) = parameters(fusion), count(fusion, values)
    length = tokens.shape[1] + int(TEXT_TOKENS)
    low = count_llm(llm, length)
    token = count_llm(llm, length + 1) - low
    return Strategy(
        row=row,
        visual_tokens=tokens.shape[1],
        params=params,
        used_params=parameters(fusion),
        fusion=theirs,
        tail=again,
        folding=first - again,
        llm=low + token * (TEXT_TOKENS % 1),
        llm_token=token,
    )


def count_reference(features: Sequence[Tensor], llm_width: int, projectors: Count) -> tuple[int, Count]:
    """The reference's cross-attention, the output that it throws away included: its parameters and what it needs."""
    sides = [isqrt(x.shape[2]) for x in features]
    with torch.device("meta"):
        tail = ReferenceTail([x.shape[3] for x in features], [(side, side) for side in sides], llm_width)
    _, needs = count(tail, features)
    return parameters(tail) - parameters(tail.projectors), needs - projectors


def count_llm(llm: PreTrainedModel, tokens: int) -> Count:
    """One sequence of so many embeddings, logits for each of them."""
    embeds = torch.empty(1, tokens, llm.config.hidden_size, device="meta")
    # Without a mask transformers would look at values to choose one.
    mask = torch.empty(1, 1, tokens, tokens, device="meta")
    return count(llm, inputs_embeds=embeds, attention_mask=mask, use_cache=False)[1]
