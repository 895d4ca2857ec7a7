"""Weights that a small language model starts from, so that minutes teach it what would otherwise take hours.

Before it can learn an answer, a language model has to find out how to look something up: which tokens stand next to
each other, and which one is like another. Both are properties of attention alone and can be had from the start: queries
and keys that are equal look for what is alike, and values that come back as they are copy it (Trockman & Kolter,
Mimetic Initialization of Self-Attention Layers, 2023). Everything stays free to change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

__all__ = ["prime"]

HEADS = (
    ("before 1", "before 2", "video", "video", "alike"),
    ("before 1", "video", "video", "alike", "before 2"),
    ("before 1", "video", "alike", "video", "alike"),
)
"""What the heads of each layer look at; those of the last line, in all layers from there on.

``before n``: the token n places before. ``alike``: tokens like this one. ``video``: of those, visual ones.
"""

EMBEDDING = 0.3
"""Standard deviation of embeddings, and size of the mark that all words have in common and visual tokens lack."""
MARKED = 0.7
"""Share of the mark in a word's embedding once it is normalised: 1 / sqrt(2)."""
SHARPNESS = {"alike": 1.0, "video": 1.9}
"""Gain of queries and of keys that look for what is alike."""
NEAR = 5.0
"""Gain of queries and of keys that look at a neighbour, in the five fastest pairs of the rotary embedding."""
UNSEEN = 10.0
"""By how much heads that look at the video would rather not look at words, in logits."""
COPIED = 0.5
"""Share of what a head looks at that is added to what looks."""
SPOKEN = 0.1
"""Gain of the embeddings as weights of the output."""


@torch.no_grad()
def prime(model: LlamaForCausalLM) -> None:
    """Set all matrices of a language model whose heads are of at least 12 channels, from torch's global seed."""
    decoder: Any = model.model
    embeddings = decoder.embed_tokens.weight
    depth = len(decoder.layers)
    for layer in decoder.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        layer.mlp.down_proj.weight.mul_((2 * depth) ** -0.5)
    mark = torch.randn(embeddings.shape[1]).sign()
    for place, layer in enumerate(decoder.layers):
        prime_attention(layer.self_attn, HEADS[min(place, len(HEADS) - 1)], mark, decoder.rotary_emb.inv_freq)
    nn.init.normal_(embeddings, std=EMBEDDING)
    model.lm_head.weight.copy_(SPOKEN * embeddings)
    embeddings.add_(EMBEDDING * mark)


def prime_attention(attention: Any, heads: tuple[str, ...], mark: Tensor, frequencies: Tensor) -> None:
    """Set the four matrices of an attention, head by head."""
    width, size = len(mark), attention.head_dim
    values = random_rotation(width)
    attention.v_proj.weight.copy_(values)
    attention.o_proj.weight.copy_(COPIED * values.T)
    content = random_rotation(width)
    content -= torch.outer(content @ mark, mark) / width
    marked = mark / (MARKED * width)
    for head in range(width // size):
        rows = slice(head * size, (head + 1) * size)
        looks, _, distance = heads[head % len(heads)].partition(" ")
        if distance:
            query, key = neighbour(frequencies, int(distance))
            noise = 0.3 * width**-0.5
            attention.q_proj.weight[rows] = torch.outer(query, marked) + noise * torch.randn(size, width)
            attention.k_proj.weight[rows] = torch.outer(key, marked) + noise * torch.randn(size, width)
            continue
        both = SHARPNESS[looks] * content[rows]
        aside = torch.zeros(size, width)
        if looks == "video":
            # The slowest pair of the rotary embedding tells nothing of distances: it is there for the mark.
            both[[size // 2 - 1, size - 1]] = 0
            aside[size // 2 - 1] = (UNSEEN * size**0.5) ** 0.5 * marked
        attention.q_proj.weight[rows] = both + aside
        attention.k_proj.weight[rows] = both - aside


def neighbour(frequencies: Tensor, distance: int) -> tuple[Tensor, Tensor]:
    """A query and a key of a head that are most alike where the key's token is ``distance`` places before."""
    gains = torch.full_like(frequencies, NEAR / 2)
    gains[:5] = NEAR
    angles = distance * frequencies
    return torch.cat([gains, torch.zeros_like(gains)]), torch.cat([gains * angles.cos(), gains * angles.sin()])


def random_rotation(width: int) -> Tensor:
    """A random orthogonal matrix."""
    return torch.linalg.qr(torch.randn(width, width))[0]
