"""Prompts about one video share what they begin with, and are answered as if they did not."""

import pytest
import torch

from merv_fast import load_vid
from merv_fast.models import merv_model
from merv_fast.models.prefix import common_prefix, prefilled, sharing_obstacle
from tests.budgets import low_precision
from tests.models.random_merv import build_tiny
from tests.models.test_generation import in_chunks
from tests.models.test_merv_model import GREEDY, QUESTIONS, prompt


@pytest.fixture
def prompts(tiny):
    return [prompt(tiny, question) for question in QUESTIONS]


@pytest.fixture
def positions(tiny, monkeypatch):
    """(rows, positions) that each pass of the language model was given."""
    passes = []
    handle = tiny.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    yield passes
    handle.remove()


def unshared(vidlm, *args, monkeypatch, **kwargs):
    """What the model answers when every prompt is prefilled from its start."""
    with monkeypatch.context() as patch:
        patch.setattr(merv_model, "sharing_obstacle", lambda *_: "asked not to")
        return vidlm.generate(*args, **kwargs)


def test_three_questions_prefill_the_video_once(tiny, clips, prompts, positions, monkeypatch):
    visual = tiny.encode(clips[0])
    expected = unshared(tiny, visual, prompts, monkeypatch=monkeypatch, **GREEDY)
    assert sum(rows * length for rows, length in positions if length > 1) > 3 * 256
    for batch_size in (8, 2, 1):
        positions.clear()
        assert tiny.generate(visual, prompts, batch_size=batch_size, **GREEDY) == expected
        long = [(rows, length) for rows, length in positions if length > 256]
        assert len(long) == 1
        assert long[0][0] == 1
        assert sum(rows * length for rows, length in positions) < 2 * 256


def test_several_videos_with_several_questions(tiny, clips, prompts, positions, monkeypatch):
    """Each prefix once, whatever the order and the batches."""
    videos = [clips[0], clips[1], clips[0], clips[1], clips[2], clips[0]]
    asked = [prompts[index] for index in (0, 1, 2, 0, 1, 1)]
    expected = unshared(tiny, videos, asked, monkeypatch=monkeypatch, **GREEDY)
    assert len(set(expected)) > 3
    for batch_size in (8, 4):
        positions.clear()
        assert tiny.generate(videos, asked, batch_size=batch_size, **GREEDY) == expected
        assert sum(rows for rows, length in positions if length > 256) == 3


def test_videos_asked_once_are_prefilled_as_ever(tiny, clips, prompts, positions):
    tiny.generate(clips, prompts, **GREEDY)
    assert [rows for rows, length in positions if length > 256] == [3]


@torch.inference_mode()
def test_logits_are_those_of_whole_prompts(tiny, clips, prompts):
    """To twice the rounding of float32 itself, measured against float64."""
    exact = build_tiny().double()
    exact.model.load_state_dict(tiny.model.state_dict())
    visual = tiny.encode(clips[0]).tokens
    inputs = tiny.processor([tiny.processor.video_token + text for text in prompts])
    rows = [ids[mask.bool()] for ids, mask in zip(*inputs.values(), strict=True)]
    given = prefilled(tiny.model, rows, [0] * 3, {0: visual}, {}, pad_token_id=0)
    start = given["past_key_values"].get_seq_length()
    assert start >= 257
    position_ids = given["attention_mask"].cumsum(1) - 1
    got = tiny.model(
        input_ids=given["input_ids"][:, start:],
        attention_mask=given["attention_mask"],
        position_ids=position_ids[:, start:].clamp_min(0),
        past_key_values=given["past_key_values"],
    ).logits
    for index, row in enumerate(rows):
        video = {"video": merv_model.MervVideoOutput(pooler_output=visual[None])}
        whole = tiny.model(input_ids=row[None], mm_encoder_outputs=video).logits[0, start:]
        video = {"video": merv_model.MervVideoOutput(pooler_output=visual[None].double())}
        truth = exact.model(input_ids=row[None], mm_encoder_outputs=video).logits[0, start:]
        error = (got[index, -len(whole) :].double() - truth).abs().max().item()
        assert error <= low_precision(whole, truth)


def test_the_golden_model_answers_the_same(golden_run, clips, monkeypatch):
    vidlm = load_vid(**golden_run)
    asked = [prompt(vidlm, question) for question in QUESTIONS]
    expected = unshared(vidlm, clips[0], asked, monkeypatch=monkeypatch, **GREEDY)
    assert vidlm.generate(clips[0], asked, **GREEDY) == expected


def test_later_calls_share_what_encode_prefilled(tiny, clips, prompts, positions):
    expected = [tiny.generate(clips[0], text, **GREEDY) for text in prompts]
    visual = tiny.encode(clips[0], prefill=True)
    assert [length for _, length in positions if length > 256][-1] == 257
    positions.clear()
    assert [tiny.generate(visual, text, **GREEDY) for text in prompts] == expected
    assert tiny.generate([visual] * 3, prompts, **GREEDY) == expected
    assert all(length < 256 for _, length in positions)
    # Beams cannot share; they answer as ever.
    assert tiny.generate(visual, prompts[0], num_beams=2, **GREEDY) == tiny.generate(
        clips[0], prompts[0], num_beams=2, **GREEDY
    )


def test_a_prefix_of_other_weights_is_not_used(clips):
    vidlm = build_tiny()
    asked = prompt(vidlm, QUESTIONS[0])
    visual = vidlm.encode(clips[2], prefill=True)
    with torch.no_grad():
        for weight in vidlm.model.language_model.model.layers[0].parameters():
            weight.mul_(-2)
    assert vidlm.generate(visual, asked, **GREEDY) == vidlm.generate(clips[2], asked, **GREEDY)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"num_beams": 2}, "num_beams is 2"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2"),
        ({"use_cache": False}, "use_cache is False"),
        ({"cache_implementation": "static"}, "cache_implementation is 'static'"),
        ({"no_repeat_ngram_size": 1}, "no_repeat_ngram_size is 1"),
        pytest.param({"prefill_chunk_size": 64}, "prefill_chunk_size is 64", marks=in_chunks),
        ({"logits_processor": []}, r"logits_processor is \[\]"),
    ],
)
def test_what_cannot_share_says_why_and_answers_as_ever(tiny, clips, prompts, positions, kwargs, reason, monkeypatch):
    import re

    assert re.fullmatch(reason, sharing_obstacle(tiny.model, kwargs))
    given = {"do_sample": kwargs.get("num_return_sequences", 1) > 1, "max_new_tokens": 3} | kwargs
    torch.manual_seed(0)
    expected = unshared(tiny, clips[0], prompts, monkeypatch=monkeypatch, **given)
    torch.manual_seed(0)
    assert tiny.generate(clips[0], prompts, **given) == expected


@pytest.mark.parametrize(
    "kwargs",
    [
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 5},
        {"num_beams": 1, "use_cache": True, "no_repeat_ngram_size": 0, "cache_implementation": None},
        {"eos_token_id": 5},
    ],
)
def test_what_can_share_answers_the_same(tiny, clips, prompts, kwargs, monkeypatch):
    assert sharing_obstacle(tiny.model, kwargs) is None
    expected = unshared(tiny, clips[0], prompts, monkeypatch=monkeypatch, **GREEDY, **kwargs)
    assert tiny.generate(clips[0], prompts, **GREEDY, **kwargs) == expected


def test_models_that_cannot_share_say_why(tiny, monkeypatch):
    config = tiny.model.config.get_text_config()
    monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
    assert sharing_obstacle(tiny.model, {}) == "attention of the language model is flash_attention_2"
    monkeypatch.undo()
    monkeypatch.setattr(config, "sliding_window", 64, raising=False)
    monkeypatch.setattr(config, "layer_types", ["full_attention", "sliding_attention"], raising=False)
    assert sharing_obstacle(tiny.model, {}) == "the language model's cache has DynamicSlidingWindowLayer"
    with pytest.raises(ValueError, match="encode: prefill must be False, for the language model's cache has Dynamic"):
        tiny.encode(None, prefill=True)
    monkeypatch.undo()
    monkeypatch.setattr(tiny.model.generation_config, "num_beams", 4)
    assert sharing_obstacle(tiny.model, {}) == "num_beams is 4"
    assert sharing_obstacle(tiny.model, {"num_beams": 1}) is None


@pytest.mark.parametrize(
    ("rows", "length"), [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2, 4]], 2), ([[3], [4]], 0), ([[5, 6]], 2)]
)
def test_common_prefix(rows, length):
    assert common_prefix([torch.tensor(row) for row in rows]) == length
