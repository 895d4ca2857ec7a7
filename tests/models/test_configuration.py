import json

import pytest
from transformers import AutoConfig, Qwen2Config

from merv_fast import MervConfig, load_vid
from merv_fast.encoders import encoder_config
from merv_fast.models.configuration import encoder_names

BASE = {  # name -> frames, slots, grid, width, blocks: the table of the paper's four encoders
    "languagebind": (16, 16, (16, 16), 1024, 23),
    "dinov2": (16, 16, (16, 16), 1024, 23),
    "vivit": (32, 16, (14, 14), 768, 12),
    "siglip": (16, 16, (14, 14), 768, 11),
}


def test_the_default_is_merv_base():
    config = MervConfig()
    assert config.encoders == list(BASE)
    assert config.num_frames == [16, 16, 32, 16]
    for name, encoder in config.encoder_configs().items():
        assert (encoder.num_frames, encoder.slots, encoder.grid, encoder.width, encoder.blocks) == BASE[name]
    assert config.text_config.vocab_size == 32064
    assert config.get_text_config() is config.text_config
    assert (config.arch_specifier, config.feature_fusion) == ("no-align+3davg+linear", "cross_attention_avg_lq")


def test_it_survives_json(tmp_path):
    config = MervConfig(text_config=Qwen2Config(hidden_size=64, tie_word_embeddings=True), video_token_id=151656)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is MervConfig
    assert again.encoder_configs() == config.encoder_configs()
    assert again.dinov2_config.architecture == config.dinov2_config.architecture
    assert again.text_config.to_dict() == config.text_config.to_dict()
    assert again.video_token_id == 151656
    assert json.loads((tmp_path / "config.json").read_text())["dinov2_config"]["architecture"]["width"] == 1024


def test_attention_can_be_chosen_part_by_part(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    assert load_vid(tmp_path).model.language_model.config._attn_implementation == "sdpa"
    model = type(tiny.model).from_pretrained(tmp_path, attn_implementation={"text_config": "eager"})
    assert model.language_model.config._attn_implementation == "eager"
    assert model.config.dinov2_config._attn_implementation != "eager"
    model = type(tiny.model).from_pretrained(tmp_path, attn_implementation="eager")
    assert model.config.dinov2_config._attn_implementation == "eager"


def test_an_encoder_needs_its_configuration():
    with pytest.raises(ValueError, match="dinov2_config must be given for encoder 'dinov2', got None"):
        MervConfig(encoders=["dinov2"])


def test_two_encoders_of_a_family_have_two_names():
    ids = ["dinov2-video-all-tokens", "siglip-vit-b16-224px-all-no-cls", "dinov2-video-all-tokens"]
    assert encoder_names([encoder_config(encoder_id, 16) for encoder_id in ids]) == ["dinov2", "siglip", "dinov2_2"]


def test_frames_are_the_encoders_matter():
    assert MervConfig(num_frames=[16, 16, 32, 16]).num_frames == [16, 16, 32, 16]
    with pytest.raises(ValueError, match=r"num_frames must be those of its encoders, \[16, 16, 32, 16\], got \[8\]"):
        MervConfig(num_frames=[8])
