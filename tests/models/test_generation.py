"""MervForConditionalGeneration as users of transformers call it."""

import pytest
import torch
import transformers

from merv_fast.models.video_model import MervVideoOutput

GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture
def inputs(tiny, clips):
    """Two ragged prompts with a video each."""
    prompts = ["In: Why?\nOut:", "In: Which way does the ball move?\nOut:"]
    return tiny.processor(text=prompts, videos=[str(clip) for clip in clips[:2]])


@pytest.fixture
def features(tiny, inputs):
    with torch.no_grad():
        return tiny.model.get_video_features(inputs["pixel_values_videos"])


def without_pixels(inputs):
    return {key: value for key, value in inputs.items() if key != "pixel_values_videos"}


def test_every_way_to_decode_gives_the_greedy_ids(tiny, inputs, features):
    expected = tiny.model.generate(**inputs, **GREEDY)
    ways = {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 1}
    for way in ways:
        assert torch.equal(tiny.model.generate(**inputs, **GREEDY, **way), expected), way
    given = {"mm_encoder_outputs": {"video": features}}
    assert torch.equal(tiny.model.generate(**without_pixels(inputs), **given, **GREEDY), expected)
    listed = {"mm_encoder_outputs": {"video": MervVideoOutput(pooler_output=list(features.pooler_output))}}
    assert torch.equal(tiny.model.generate(**without_pixels(inputs), **listed, **GREEDY), expected)


in_chunks = pytest.mark.skipif(
    not hasattr(transformers.generation.utils, "_slice_mm_encoder_output"),
    reason="this transformers cannot split a video over chunks of a prompt",
)


@in_chunks
def test_a_prompt_in_chunks(tiny, inputs):
    expected = tiny.model.generate(**inputs, **GREEDY)
    assert torch.equal(tiny.model.generate(**inputs, **GREEDY, prefill_chunk_size=64), expected)


def test_embeddings_instead_of_ids(tiny, inputs, features):
    expected = tiny.model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    embeds = tiny.model.embed(inputs["input_ids"], features)
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    assert torch.equal(tiny.model.generate(**given, **GREEDY), expected)
    assert torch.equal(tiny.model.generate(**given, use_cache=False, **GREEDY), expected)


def test_text_alone(tiny):
    inputs = tiny.processor(text="In: Why?\nOut:")
    got = tiny.model.generate(**inputs, **GREEDY)
    expected = tiny.model.language_model.generate(**inputs, **GREEDY)
    assert torch.equal(got, expected)
    assert torch.equal(tiny.model.generate(**inputs, mm_encoder_outputs={}, **GREEDY), expected)


def test_a_conversation_goes_on_from_its_cache(tiny, inputs):
    first = tiny.model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]] * 2)], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, ids.shape[1] - inputs["input_ids"].shape[1])], dim=1)
    whole = tiny.model.generate(
        input_ids=ids, attention_mask=mask.long(), pixel_values_videos=inputs["pixel_values_videos"], **GREEDY
    )
    rest = tiny.model.generate(
        input_ids=ids, attention_mask=mask.long(), past_key_values=first.past_key_values, **GREEDY
    )
    assert torch.equal(rest, whole)


def test_placeholders_need_a_video(tiny):
    inputs = tiny.processor(text="<|video_pad|>In: Why?")
    with pytest.raises(ValueError, match="must hold no placeholders without a video, got 256"):
        tiny.model(**inputs)
    with pytest.raises(ValueError, match="must hold no placeholders without a video, got 256"):
        tiny.model.generate(**inputs, **GREEDY)


def test_a_video_goes_with_ids(tiny, inputs, features):
    embeds = tiny.model.embed(inputs["input_ids"], features)
    with pytest.raises(
        ValueError, match="pixel_values_videos must be left out with mm_encoder_outputs or inputs_embeds"
    ):
        tiny.model(inputs_embeds=embeds, pixel_values_videos=inputs["pixel_values_videos"])


@torch.no_grad()
def test_outputs_as_tuples(tiny, inputs):
    output = tiny.model(**inputs)
    logits, *_ = as_tuple = tiny.model(**inputs, return_dict=False)
    assert type(as_tuple) is tuple
    assert torch.equal(logits, output.logits)
    tokens, weights = as_tuple = tiny.model.get_video_features(inputs["pixel_values_videos"], return_dict=False)
    assert type(as_tuple) is tuple
    assert torch.equal(weights, output.encoder_weights)
    assert torch.equal(tokens, tiny.model.get_video_features(inputs["pixel_values_videos"]).pooler_output)


@pytest.mark.parametrize("fused", [True, False])
def test_autocast(tiny, inputs, fused, monkeypatch):
    monkeypatch.setattr(tiny.model.video_model.tail, "collapsed", fused)
    with torch.autocast("cpu", torch.bfloat16):
        output = tiny.model(**inputs, labels=inputs["input_ids"])
    assert output.logits.isfinite().all()
    output.loss.backward()
    assert tiny.model.video_model.tail.fusion.Q.grad.isfinite().all()
    tiny.model.zero_grad()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*is deprecated:FutureWarning")
def test_gradient_checkpointing(tiny, inputs):
    assert tiny.model.supports_gradient_checkpointing
    tiny.model.gradient_checkpointing_enable()
    tiny.model.train()
    try:
        tiny.model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert tiny.model.video_model.tail.fusion.Q.grad.any()
    finally:
        tiny.model.gradient_checkpointing_disable()
        tiny.model.eval()
        tiny.model.zero_grad()
