"""What transformers does with a saved model: device maps, quantisation, remote code, pipelines."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_torchvision_available

from merv_fast.models import MervForConditionalGeneration, MervProcessor, MervVideoModel
from merv_fast.models.quantization import language_model_only
from tests.budgets import EIGHT_BIT_WEIGHTS

PROMPT = "In: Why?\nOut:"
GREEDY = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    tiny.save_pretrained(path, max_shard_size="1MB")
    return path


def answer(folder, clip, **kwargs):
    model = MervForConditionalGeneration.from_pretrained(folder, **kwargs)
    inputs = MervProcessor.from_pretrained(folder)(text=[PROMPT], videos=[str(clip)])
    return model.generate(**inputs, **GREEDY)


ENCODERS = ("languagebind", "dinov2", "vivit", "siglip")


@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        {"video_model": "cpu", "language_model": "disk"},
        {"video_model.encoders": "disk", "video_model.tail": "cpu", "language_model": "cpu"},
        {
            **{f"video_model.encoders.{name}": "disk" if name < "m" else "cpu" for name in ENCODERS},
            "video_model.tail": "cpu",
            "language_model": "disk",
        },
    ],
)
def test_device_maps(folder, clips, tmp_path, device_map):
    pytest.importorskip("accelerate")
    mapped = answer(folder, clips[0], device_map=device_map, offload_folder=tmp_path)
    assert torch.equal(mapped, answer(folder, clips[0]))


def test_the_tail_cannot_be_offloaded(folder, tmp_path):
    pytest.importorskip("accelerate")
    device_map = {"video_model": "disk", "language_model": "cpu"}
    with pytest.raises(ValueError, match=r"device_map must keep projectors and fusion \(video_model\.tail\)"):
        MervForConditionalGeneration.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)


def test_no_encoder_is_cut_in_two(tiny):
    accelerate = pytest.importorskip("accelerate")
    third = sum(parameter.numel() * 4 for parameter in tiny.model.parameters()) // 3
    room = {0: third, 1: third, "cpu": 10 * third}
    classes = list(tiny.model._no_split_modules)
    assert "LlamaDecoderLayer" in classes
    parts = accelerate.infer_auto_device_map(tiny.model, room, no_split_module_classes=classes)
    cut = [name for name in parts if name.startswith("video_model.encoders.") and name.count(".") > 2]
    assert parts
    assert not cut


def test_quantisation_leaves_the_video_model_out():
    given = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["language_model.model.layers.0"])
    config = language_model_only(given)
    assert config.llm_int8_skip_modules == ["language_model.model.layers.0", "video_model", "lm_head"]
    assert given.llm_int8_skip_modules == ["language_model.model.layers.0"]
    assert language_model_only(BitsAndBytesConfig()).llm_int8_skip_modules == ["video_model", "lm_head"]
    as_dict = language_model_only({"quant_method": "fp8", "modules_to_not_convert": None})
    assert as_dict == {"quant_method": "fp8", "modules_to_not_convert": ["video_model", "lm_head"]}
    with pytest.raises(ValueError, match=r"must be one that can leave out modules, .* got object"):
        language_model_only(object())


def test_a_video_model_alone_is_not_quantised(folder):
    with pytest.raises(ValueError, match="quantization_config must be left out: only a language model"):
        MervVideoModel.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_a_quantised_language_model(folder, clips):
    quantisation = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    config = TorchAoConfig(quantisation.Int8WeightOnlyConfig())
    model = MervForConditionalGeneration.from_pretrained(folder, quantization_config=config)
    plain = MervForConditionalGeneration.from_pretrained(folder)
    kinds = {name: type(weight) for name, weight in model.named_parameters()}
    layers = "language_model.model.layers."
    assert {kind.__name__ for name, kind in kinds.items() if name.startswith(layers) and "proj" in name} == {
        "Int8Tensor"
    }
    assert {kind for name, kind in kinds.items() if name.startswith("video_model.")} == {torch.nn.Parameter}
    inputs = MervProcessor.from_pretrained(folder)(text=[PROMPT], videos=[str(clips[0])])
    with torch.inference_mode():
        got, right = (each(**inputs, logits_to_keep=1).logits.softmax(-1) for each in (model, plain))
    assert (got - right).abs().max() < EIGHT_BIT_WEIGHTS


def test_auto_classes_find_ours_in_the_folder(folder):
    program = f"""
import sys
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor
assert "merv_fast" not in sys.modules
for auto in (AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor):
    print(type(auto.from_pretrained({str(folder)!r}, trust_remote_code=True)).__name__)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["MervConfig", "MervVideoModel", "MervForConditionalGeneration", "MervProcessor"]


@pytest.mark.skipif(not is_torchvision_available(), reason="transformers has this pipeline only with torchvision")
def test_pipeline(tiny, folder, clips):
    from transformers import AutoVideoProcessor, pipeline

    from merv_fast.models import MervVideoProcessor

    assert isinstance(AutoVideoProcessor.from_pretrained(folder), MervVideoProcessor)
    content = [{"type": "video", "path": str(clips[0])}, {"type": "text", "text": "Why?"}]
    (answered,) = pipeline("any-to-any", model=str(folder))(
        text=[{"role": "user", "content": content}], max_new_tokens=6, generate_kwargs={"do_sample": False}
    )
    builder = tiny.get_prompt_builder()
    builder.add_turn("human", "Why?")
    assert answered["generated_text"][-1]["content"] == tiny.generate(clips[0], builder.get_prompt(), **GREEDY)
