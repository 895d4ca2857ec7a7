"""Before anything is learned, heads look at neighbours, at what is alike, and at the video."""

import pytest
import torch
from transformers import LlamaForCausalLM

from merv_fast.training.tiny.mimetic import HEADS, prime
from merv_fast.training.tiny.model import tiny_config

VISUAL, WORDS = 40, 16


@pytest.fixture(scope="module")
def seen():
    """A primed model, visual tokens some of which are like words that follow, and what each layer attends to."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config().text_config).eval()
    prime(model)
    model.config._attn_implementation = "eager"
    words = torch.randperm(500)[:WORDS]
    embeddings = model.get_input_embeddings().weight.detach()
    content = embeddings - embeddings.mean(0)
    visual = content[torch.randint(500, (VISUAL,))]
    visual[::4] = content[words[0]]
    inputs = torch.cat([visual, embeddings[words]])[None]
    with torch.no_grad():
        return model(inputs_embeds=inputs, output_attentions=True).attentions


def heads(layer, kind):
    return [place for place, name in enumerate(HEADS[min(layer, len(HEADS) - 1)]) if name == kind]


@pytest.mark.parametrize("distance", [1, 2])
def test_a_word_looks_at_the_one_before(seen, distance):
    for layer in (0, 1):
        for head in heads(layer, f"before {distance}"):
            words = seen[layer][0, head, VISUAL:, VISUAL:]
            assert words.diagonal(-distance).mean() > 0.5, (layer, head)


def test_a_word_looks_at_what_is_like_it_in_the_video(seen):
    for head in heads(0, "video"):
        weights = seen[0][0, head, VISUAL]
        assert weights[:VISUAL:4].sum() > 0.5, head


def test_video_heads_do_not_look_at_words(seen):
    for layer in (0, 1, 2, 3):
        for head in heads(layer, "video"):
            assert seen[layer][0, head, VISUAL:, VISUAL:].sum(-1).mean() < 0.3, (layer, head)


def test_what_a_token_is_like_is_the_likeliest_to_be_said():
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config().text_config)
    prime(model)
    embeddings = model.get_input_embeddings().weight.detach()
    said = model.get_output_embeddings().weight.detach() @ (embeddings - embeddings.mean(0)).T
    assert (said.argmax(0) == torch.arange(len(embeddings))).float().mean() > 0.95


def test_words_that_recur_are_looked_at():
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config().text_config).eval()
    prime(model)
    model.config._attn_implementation = "eager"
    ids = torch.randperm(500)[:WORDS].repeat(2)[None]
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions[0][0, heads(0, "alike")]
    again = torch.arange(WORDS, 2 * WORDS)
    assert (weights[:, again, again] + weights[:, again, again - WORDS]).mean() > 0.4
