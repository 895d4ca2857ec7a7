"""Any causal language model behind the visual tokens: here Qwen-2.5, without BOS and with tied embeddings."""

import pytest
import torch
from transformers import Qwen2Config

from merv_fast import MervConfig, MervForConditionalGeneration, MervModel, MervProcessor, MervVideoProcessor, load_vid
from merv_fast.models.chat_templates import chat_template
from merv_fast.models.configuration import MervEncoderConfig
from merv_fast.models.llms import LLMS, language_model
from merv_fast.models.prompts import PROMPT_BUILDERS
from tests.models.golden_run import byte_tokenizer
from tests.models.random_merv import tiny_encoders

GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def qwen():
    text = Qwen2Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=0,
    )
    encoders = {name: config for name, config in tiny_encoders().items() if name in ("dinov2", "siglip")}
    config = MervConfig(
        encoders=list(encoders),
        text_config=text,
        projector_token_length=4,
        fusion_query_width=32,
        prompt_format="qwen2.5",
        video_token_id=3,
        **{f"{name}_config": MervEncoderConfig.from_encoder(encoder) for name, encoder in encoders.items()},
    )
    torch.manual_seed(0)
    model = MervForConditionalGeneration(config)
    tokenizer = byte_tokenizer(320)
    tokenizer._tokenizer.post_processor = None
    tokenizer.bos_token = None
    processor = MervProcessor(
        MervVideoProcessor(num_frames=16), tokenizer, chat_template("qwen2.5", "<|video_pad|>"), num_video_tokens=64
    )
    return MervModel(model, processor)


def test_it_answers_and_survives_saving(qwen, clips, tmp_path):
    builder = qwen.get_prompt_builder()
    builder.add_turn("human", "Why?")
    expected = qwen.generate(clips, builder.get_prompt(), **GREEDY)
    qwen.save_pretrained(tmp_path)
    again = load_vid(tmp_path)
    assert again.generate(clips, builder.get_prompt(), **GREEDY) == expected
    head, embedding = again.model.get_output_embeddings(), again.model.get_input_embeddings()
    assert head.weight.data_ptr() == embedding.weight.data_ptr()


@torch.no_grad()
def test_the_video_comes_first(qwen, clips):
    """The reference's splice for a tokenizer without BOS."""
    inputs = qwen.processor(text="<|video_pad|>Why?", videos=str(clips[0]))
    placed = qwen.model(**inputs).logits
    tokens = qwen.model.get_video_features(inputs["pixel_values_videos"]).pooler_output
    text = qwen.model.get_input_embeddings()(torch.tensor([qwen.tokenizer("Why?").input_ids]))
    spliced = qwen.model.language_model(inputs_embeds=torch.cat([tokens, text], dim=1)).logits
    assert torch.equal(placed, spliced)


def test_a_placeholder_may_lie_past_the_embedding(qwen, clips):
    """A tokenizer may number its video token behind the last row."""
    inputs = qwen.processor(text="<|video_pad|>Why?", videos=str(clips[0]))
    with torch.no_grad():
        expected = qwen.model(**inputs).logits
        qwen.config.video_token_id = 5000
        try:
            inputs["input_ids"][inputs["input_ids"] == 3] = 5000
            assert torch.equal(qwen.model(**inputs).logits, expected)
        finally:
            qwen.config.video_token_id = 3


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[3] * 63], r"input_ids must hold 64 placeholders \(id 3\) for 1 videos of 64 tokens, got 63"),
        (None, "give exactly one of input_ids and inputs_embeds"),
    ],
)
def test_says_what_is_wrong(qwen, clips, ids, message):
    frames = qwen.processor(videos=str(clips[0]))["pixel_values_videos"]
    with pytest.raises(ValueError, match=message):
        qwen.model(input_ids=ids and torch.tensor(ids), pixel_values_videos=frames)


def test_gradients_reach_every_trained_part(qwen, clips):
    inputs = qwen.processor(text="<|video_pad|>Why?", videos=str(clips[0]))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 3, -100)
    qwen.model.video_model.encoders.requires_grad_(False)
    try:
        qwen.model(**inputs, labels=labels).loss.backward()
        without = [
            n for n, p in qwen.model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
        ]
        assert without == ["video_model.tail.fusion.k_proj.bias"]  # the same for every encoder, so it cancels
        assert all(p.grad is None for p in qwen.model.video_model.encoders.parameters())
    finally:
        qwen.model.zero_grad()
        qwen.model.requires_grad_(True)


def test_every_language_model_of_the_reference_has_a_row():
    assert set(LLMS) == {
        "llama2-7b-pure",
        "llama2-13b-pure",
        "llama2-7b-chat",
        "llama2-13b-chat",
        "vicuna-v15-7b",
        "vicuna-v15-13b",
        "llama3-8b-pure",
        "llama3-8b-chat",
        "llama3.1-8b-chat",
        "qwen2.5-7b-instruct",
        "qwen2.5-3b-instruct",
    }
    assert {row.prompt_format for row in LLMS.values()} == set(PROMPT_BUILDERS)
    with pytest.raises(ValueError, match=r"llm_backbone_id must be one of llama2-7b-pure.*got 'gpt-2'"):
        language_model("gpt-2")
