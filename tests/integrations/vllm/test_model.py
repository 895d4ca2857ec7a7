"""The model for vLLM and its registration, with a stand-in for the parts of vLLM 0.33 that they use.

The stand-in has their names and signatures; vLLM itself has not run this.
"""

import importlib
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import nn

from merv_fast import load_vid, sample_clip
from merv_fast.integrations.vllm import plugin
from merv_fast.video import load_frames

NAME = "merv_fast.integrations.vllm.model"
Info = TypeVar("Info")


class SupportsMultiModal:
    def configure_mm_token_handling(self, vocab_size, mm_token_ids):
        self.vocabulary = vocab_size, mm_token_ids

    @contextmanager
    def _mark_tower_model(self, vllm_config, modalities, *, targets=None):
        yield

    @contextmanager
    def _mark_language_model(self, vllm_config, *, targets=None):
        yield


class Loader:
    """Gives each tensor to the parameter of its name, as vLLM's does for parts without a loader of their own."""

    def __init__(self, module):
        self.module = module

    def load_weights(self, weights):
        parameters = dict(self.module.named_parameters())
        for name, tensor in weights:
            parameters[name].data.copy_(tensor)
        return set(parameters)


class BaseProcessingInfo:
    def __init__(self, ctx):
        self.ctx = ctx


class WithInfo(Generic[Info]):
    def __init__(self, info):
        self.info = info

    def _get_dummy_videos(self, *, width, height, num_frames, num_videos, overrides=None):
        return [(num_frames, height, width)] * num_videos


@dataclass
class PromptReplacement:
    modality: str
    target: Any
    replacement: Any


class MultiModalFieldConfig:
    @staticmethod
    def batched(modality, *, keep_on_cpu=False):
        return "batched", modality


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in, and what it is told."""
    told = SimpleNamespace(models={}, processors={})

    def register_processor(processor, *, info, dummy_inputs):
        def register(cls):
            told.processors[cls] = processor, info, dummy_inputs
            return cls

        return register

    def language_model(*, vllm_config, hf_config, prefix=""):
        assert prefix == "language_model"
        model = vllm_config.language_model
        return model

    registry = SimpleNamespace(register_model=lambda architecture, model: told.models.update({architecture: model}))
    modules = {
        "vllm": {"ModelRegistry": registry, "__version__": "0.33.0"},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.interfaces": {"SupportsMultiModal": SupportsMultiModal, "SupportsPP": object},
        "vllm.model_executor.models.utils": {
            "AutoWeightsLoader": Loader,
            "init_vllm_registered_model": language_model,
            "maybe_prefix": lambda prefix, name: f"{prefix}.{name}" if prefix else name,
        },
        "vllm.multimodal": {"MULTIMODAL_REGISTRY": SimpleNamespace(register_processor=register_processor)},
        "vllm.multimodal.inputs": {"MultiModalFieldConfig": MultiModalFieldConfig},
        "vllm.multimodal.processing": {
            "BaseDummyInputsBuilder": WithInfo,
            "BaseMultiModalProcessor": WithInfo,
            "BaseProcessingInfo": BaseProcessingInfo,
            "PromptReplacement": PromptReplacement,
        },
    }
    for name, values in modules.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    # A base that stands for nothing may not come before one with a metaclass of its own.
    sys.modules["vllm.model_executor.models.interfaces"].SupportsPP = type("SupportsPP", (), {})
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield told
    sys.modules.pop(NAME, None)


@pytest.fixture(scope="module")
def tiny():
    return load_vid("merv-tiny")


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.make_empty_intermediate_tensors = "factory"

    def model(self, input_ids, positions, intermediate_tensors, inputs_embeds=None):
        return input_ids, positions, intermediate_tensors, inputs_embeds

    def compute_logits(self, hidden_states):
        return hidden_states + 1


def test_registration(vllm, caplog, monkeypatch):
    plugin.register()
    ((architecture, where),) = vllm.models.items()
    module, _, name = where.partition(":")
    assert architecture == load_vid("merv-tiny").config.architectures[0]
    assert getattr(importlib.import_module(module), name).__name__ == architecture
    vllm.models.clear()
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.40.1")
    plugin.register()
    assert not vllm.models
    assert "for vLLM <0.34,>=0.33, got 0.40.1" in caplog.text


def test_the_model(vllm, tiny):
    module = importlib.import_module(NAME)
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=tiny.config), language_model=LanguageModel())
    model = module.MervForConditionalGeneration(vllm_config=config)
    assert model.vocabulary == (tiny.config.get_text_config().vocab_size, [tiny.config.video_token_id])
    weights = {f"video_model.{name}": value for name, value in tiny.model.video_model.state_dict().items()}
    weights |= {"language_model.head.weight": torch.eye(2), "language_model.head.bias": torch.ones(2)}
    assert model.load_weights(weights.items()) == set(weights)
    frames = load_frames(sample_clip(), max(tiny.config.num_frames)).movedim(-1, 1)
    right = tiny.encode(sample_clip()).tokens
    for videos in (torch.stack([frames, frames]), [frames, frames[..., ::2]]):
        first, _ = model.embed_multimodal(pixel_values_videos=videos)
        assert torch.equal(first, right)
    assert model.embed_multimodal() == []
    assert model.forward(1, 2, None, 3) == (1, 2, None, 3)
    assert model.forward(1, 2, "later stage", 3) == (1, 2, "later stage", None)
    assert model.compute_logits(torch.zeros(1)) == 1
    assert model.get_placeholder_str("video", 0) == tiny.processor.video_token
    with pytest.raises(ValueError, match="modality must be 'video', got 'image'"):
        model.get_placeholder_str("image", 0)


def test_the_processor(vllm, tiny):
    module = importlib.import_module(NAME)
    ((processor, info, dummy_inputs),) = vllm.processors.values()
    given = {}
    context = SimpleNamespace(
        get_hf_config=lambda kind: given.setdefault(kind, tiny.config),
        get_hf_processor=lambda kind, **kwargs: given.setdefault(kind, tiny.processor),
    )
    info = info(context)
    assert info.get_supported_mm_limits() == {"video": 1}
    assert info.get_mm_max_tokens_per_item(4096, {"video": 1}) == {"video": tiny.processor.num_video_tokens}
    (update,) = processor(info)._get_prompt_updates(None, {}, None)
    assert update.target == [tiny.config.video_token_id]
    # What a marker becomes is what our own processor makes of it.
    ids = tiny.processor([tiny.processor.video_token + "In: a\nOut:"])["input_ids"][0].tolist()
    assert ids[1 : 1 + len(update.replacement)] == update.replacement
    assert ids.count(tiny.config.video_token_id) == len(update.replacement)
    assert processor(info)._get_mm_fields_config(None, {}) == {"pixel_values_videos": ("batched", "video")}
    dummies = dummy_inputs(info)
    assert dummies.get_dummy_text({"video": 1}) == tiny.processor.video_token
    assert dummies.get_dummy_mm_data(4096, {"video": 1}, {}) == {"video": [(max(tiny.config.num_frames), 224, 224)]}
    assert set(given) == {module.MervConfig, module.MervProcessor}


def test_frames_go_through_the_processor_without_text(tiny):
    frames = load_frames(sample_clip(), max(tiny.config.num_frames))
    inputs = tiny.processor(videos=[frames.numpy()])
    assert set(inputs) == {"pixel_values_videos"}
    assert torch.equal(inputs["pixel_values_videos"][0], frames.movedim(-1, 1))
