"""How the attention of a model's encoders is chosen, and where the choice shows."""

from importlib import metadata

import pytest
import torch

from merv_fast import load_vid
from merv_fast.models.identity import model_identity
from merv_fast.models.modeling import MervForConditionalGeneration
from merv_fast.modules.attention_backends import BACKENDS, backend_version
from merv_fast.runtime.cache import VideoCache
from merv_fast.runtime.cache.video_cache import CacheCounts
from tests.budgets import GOLDEN, relative_error
from tests.models.random_merv import build_tiny
from tests.modules.attention_packages import install, remove

ENCODERS = ["languagebind", "dinov2", "vivit", "siglip"]


@pytest.fixture
def model():
    return build_tiny().model.eval()


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    return tmp_path


def frames():
    return torch.randint(0, 256, (1, 32, 3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_default_is_sdpa(model):
    assert model.video_model.attention == dict.fromkeys(ENCODERS, "sdpa")


def test_all_or_some_encoders(model):
    video = model.video_model
    expected = video(frames()).pooler_output
    video.set_attention("eager")
    assert video.attention == dict.fromkeys(ENCODERS, "eager")
    assert relative_error(video(frames()).pooler_output, expected) < GOLDEN
    video.set_attention({"dinov2": "sdpa"})
    assert video.attention == dict.fromkeys(ENCODERS, "eager") | {"dinov2": "sdpa"}
    # The configuration says the same, and the language model is left alone.
    said = {name: getattr(model.config, f"{name}_config")._attn_implementation for name in ENCODERS}
    assert said == video.attention
    assert model.language_model.config._attn_implementation == "sdpa"


def test_one_that_does_not_serve_changes_none(model, monkeypatch):
    remove(monkeypatch, "xformers")
    video = model.video_model
    with pytest.raises(ValueError, match=r"head size of sdpa_flash must be a multiple of 8 .*, got 12"):
        video.set_attention({"languagebind": "eager", "siglip": "sdpa_flash"})
    with pytest.raises(ImportError, match=r"xformers must be importable for xformers \(pip install xformers\)"):
        video.set_attention("xformers")
    with pytest.raises(ValueError, match=r"MervVideoModel: encoders must be among languagebind, .*, got clip, vit"):
        video.set_attention({"vit": "eager", "dinov2": "eager", "clip": "eager"})
    with pytest.raises(ImportError, match="xformers must be importable"):
        model.set_attn_implementation({"text_config": "eager", "dinov2_config": "eager", "siglip_config": "xformers"})
    assert video.attention == dict.fromkeys(ENCODERS, "sdpa")
    assert model.language_model.config._attn_implementation == "sdpa"


def test_from_pretrained_chooses_part_by_part(folder):
    given = {"text_config": "sdpa", "dinov2_config": "eager"}
    model = MervForConditionalGeneration.from_pretrained(folder, attn_implementation=given)
    assert model.video_model.attention == dict.fromkeys(ENCODERS, "sdpa") | {"dinov2": "eager"}
    model = MervForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    assert model.video_model.attention == dict.fromkeys(ENCODERS, "eager")
    assert model.language_model.config._attn_implementation == "eager"


def test_from_pretrained_refuses_what_is_missing(folder, monkeypatch):
    remove(monkeypatch, "xformers")
    for given, message in (
        ("xformers", "xformers must be importable"),
        ("sdpa_cudnn", "head size of sdpa_cudnn .*, got 12"),
        ("flex_attention", "backend must be one of .*, got 'flex_attention'"),
    ):
        with pytest.raises((ImportError, ValueError), match=message):
            MervForConditionalGeneration.from_pretrained(folder, attn_implementation={"vivit_config": given})


def test_the_device_is_left_to_the_first_call(folder, monkeypatch):
    install(monkeypatch, "flash_attention_2", on_cpu=False)
    # merv-tiny has heads of 12.
    monkeypatch.setitem(BACKENDS, "flash_attention_2", BACKENDS["flash_attention_2"]._replace(head_sizes=None))
    given = {"vivit_config": "flash_attention_2"}
    model = MervForConditionalGeneration.from_pretrained(folder, attn_implementation=given)
    assert model.video_model.attention["vivit"] == "flash_attention_2"
    with pytest.raises(ValueError, match=r"tensors of flash_attention_2 must be on cuda .*, got cpu"):
        model.video_model(frames())


def test_transformers_own_way_to_change_it(model):
    model.set_attn_implementation("eager")
    assert model.video_model.attention == dict.fromkeys(ENCODERS, "eager")
    assert model.language_model.config._attn_implementation == "eager"
    model.set_attn_implementation({"siglip_config": "sdpa", "text_config": "sdpa"})
    assert model.video_model.attention == dict.fromkeys(ENCODERS, "eager") | {"siglip": "sdpa"}
    assert model.language_model.config._attn_implementation == "sdpa"
    model.video_model.set_attn_implementation("sdpa")
    assert model.video_model.attention == dict.fromkeys(ENCODERS, "sdpa")


def test_what_is_saved_does_not_hold_it(model, tmp_path):
    keys = list(model.state_dict())
    model.video_model.set_attention("eager")
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    again = MervForConditionalGeneration.from_pretrained(tmp_path)
    assert again.video_model.attention == dict.fromkeys(ENCODERS, "sdpa")
    again.video_model.set_attention("eager")
    assert torch.equal(again.video_model(frames()).pooler_output, model.video_model(frames()).pooler_output)


@pytest.mark.parametrize("keep", ["tokens", "features"])
def test_another_backend_is_another_identity(model, keep, monkeypatch):
    video, cache = model.video_model, VideoCache(keep=keep)
    found = [model_identity(video, cache)]
    video.set_attention({"dinov2": "eager"})
    found.append(model_identity(video, cache))
    video.set_attention({"dinov2": "sdpa", "siglip": "eager"})
    found.append(model_identity(video, cache))
    install(monkeypatch, "xformers")
    monkeypatch.setitem(
        BACKENDS, "xformers", BACKENDS["xformers"]._replace(head_sizes=None, dtypes=None, load=lambda: abs)
    )
    for version in ("0.0.35", "0.0.36"):
        monkeypatch.setattr(metadata, "version", lambda package, version=version: version)
        backend_version.cache_clear()
        video.set_attention("xformers")
        found.append(model_identity(video, cache))
    backend_version.cache_clear()
    assert len(set(found)) == 5
    video.set_attention("sdpa")
    assert model_identity(video, cache) == found[0]


def test_a_cache_keeps_the_results_of_backends_apart(clips):
    vidlm = build_tiny()
    vidlm.cache = VideoCache()
    for backend in ("sdpa", "eager", "sdpa", "eager"):
        vidlm.model.video_model.set_attention(backend)
        vidlm.encode(clips[2])
    assert vidlm.cache.counts == CacheCounts(hits=2, misses=2)


def test_load_vid_has_the_default(folder):
    assert load_vid(folder).model.video_model.attention == dict.fromkeys(ENCODERS, "sdpa")
