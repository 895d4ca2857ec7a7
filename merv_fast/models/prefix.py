"""What several prompts begin with, the visual tokens above all, goes through the language model once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from merv_fast.models.modeling import MervForConditionalGeneration
from merv_fast.models.splice import pad
from merv_fast.models.video_model import MervVideoOutput
from merv_fast.versions import Versions

__all__ = ["Prefix", "common_prefix", "prefill", "prefilled", "sharing_obstacle"]

SAFE = {
    *("max_new_tokens", "min_new_tokens", "max_length", "min_length", "max_time"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "stop_strings", "tokenizer", "streamer"),
}
"""Settings of ``generate`` that work alike on a cache that is already filled and on prompts padded in their middle."""

NEUTRAL = {"use_cache": True, "num_beams": 1, "num_return_sequences": 1, "cache_implementation": "dynamic"}
"""Values by which a setting changes nothing, where that is not None, False or 0."""


@dataclass(frozen=True)
class Prefix:
    """Token ids [P] that prompts begin with, and what the language model made of them.

    Args:
        ids: int64, with placeholders where the visual tokens stand.
        layers: keys and values [1, heads, P, d] of each layer.
        versions: the state of the language model's weights at the time.
    """

    ids: Tensor
    layers: list[tuple[Tensor, Tensor]]
    versions: Versions

    def fits(self, model: MervForConditionalGeneration) -> bool:
        """Whether the language model is still the one that made it."""
        return self.versions.same(list(model.language_model.parameters()))


def sharing_obstacle(model: MervForConditionalGeneration, kwargs: Mapping[str, Any]) -> str | None:
    """Why prompts cannot share a prefix under these arguments of ``generate``, or None.

    Where they cannot, each is prefilled from its start, as ever: with beams or several sequences, with a cache that is
    static, quantised, offloaded or slides, with attention other than ``sdpa`` and ``eager``, and with settings that
    look at where in the prompt a token stands.
    """
    given = model.generation_config.to_diff_dict() | dict(kwargs)
    given.pop("transformers_version", None)
    for name, value in given.items():
        neutral = value is None or (isinstance(value, (bool, int, str)) and value == NEUTRAL.get(name, False))
        if not (name in SAFE or name.startswith("_") or neutral):
            return f"{name} is {value!r}"
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attention of the language model is {config._attn_implementation}"
    if not model._supports_default_dynamic_cache():
        return "the language model has a cache of its own"
    kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers} - {DynamicLayer.__name__}
    return f"the language model's cache has {', '.join(sorted(kinds))}" if kinds else None


def common_prefix(rows: Sequence[Tensor]) -> int:
    """How many tokens all rows [S_i] begin with."""
    shortest = min(map(len, rows))
    first = torch.stack([row[:shortest] for row in rows])
    return int((first == first[0]).all(0).cumprod(0).sum())


def prefilled(
    model: MervForConditionalGeneration,
    rows: Sequence[Tensor],
    keys: Sequence[Hashable],
    tokens: Mapping[Hashable, Tensor],
    known: dict[Hashable, Prefix],
    pad_token_id: int,
) -> dict[str, Any]:
    """Arguments of ``generate`` for prompts of which the common beginning is prefilled, once for each video.

    Args:
        model: in inference mode.
        rows: token ids [S_i] of B prompts, placeholders first.
        keys: which video each is about.
        tokens: visual tokens [V, D] of each video.
        known: prefixes that have been prefilled; new ones are added.
        pad_token_id: what stands at positions that are masked.

    Returns:
        ``input_ids`` and ``attention_mask`` [B, P + max(S_i - P)], where what lacks in a prompt's own part is padded
        before it, and ``past_key_values`` of the first P positions.
    """
    length = common_prefix([*rows, *(known[key].ids for key in keys if key in known)])
    # One token at least is left, whose logits begin the answer.
    length = min(length, min(map(len, rows)) - 1)
    if missing := [key for key in dict.fromkeys(keys) if key not in known]:
        known |= prefill(model, rows[0][:length], {key: tokens[key] for key in missing})
    cache = DynamicCache(config=model.config.get_text_config())
    for index in range(len(known[keys[0]].layers)):
        k, v = (torch.cat([known[key].layers[index][part][:, :, :length] for key in keys]) for part in (0, 1))
        cache.update(k, v, index)
    ids, mask = pad([row[length:].tolist() for row in rows], pad_token_id)
    prefix = rows[0][:length].expand(len(rows), -1)
    ids, mask = torch.cat([prefix, ids], 1), torch.cat([torch.ones_like(prefix), mask], 1)
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device), "past_key_values": cache}


def prefill(
    model: MervForConditionalGeneration, ids: Tensor, tokens: Mapping[Hashable, Tensor]
) -> dict[Hashable, Prefix]:
    """Prefixes of the same ids [P] and each video's tokens [V, D], in one pass."""
    cache = DynamicCache(config=model.config.get_text_config())
    model(
        input_ids=ids.expand(len(tokens), -1).to(model.device),
        mm_encoder_outputs={"video": MervVideoOutput(pooler_output=torch.stack(list(tokens.values())))},
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    versions = Versions(list(model.language_model.parameters()))
    return {key: Prefix(ids, [(k[[i]], v[[i]]) for k, v in layers], versions) for i, key in enumerate(tokens)}
