import json
import os
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import AutoModel

from merv_fast import CheckpointError, available_models, load_vid
from merv_fast.models import MervVideoModel
from merv_fast.models.reference import read_run_config
from tests.golden_files import load
from tests.models.golden_run import MODELS, byte_tokenizer, checkpoint, write_run
from tests.models.random_merv import build_tiny


@pytest.fixture
def run(golden_run, tmp_path):
    """A copy of the golden run that a test may break."""
    shutil.copytree(golden_run["model_id_or_path"], tmp_path / "run")
    return golden_run | {"model_id_or_path": tmp_path / "run"}


def rewrite(run, **groups):
    path = run["model_id_or_path"] / "checkpoints/latest-checkpoint.pt"
    torch.save({"model": checkpoint(load(MODELS[0])[0]) | groups}, path)


def test_weights_arrive_unchanged(golden_run):
    groups = checkpoint(load(MODELS[0])[0])
    state = load_vid(**golden_run).model.state_dict()
    for key, value in groups["llm_backbone"].items():
        assert torch.equal(state["language_model." + key.removeprefix("llm.")], value)
    for key, value in groups["projectors"].items():
        assert torch.equal(state["video_model.tail.projectors." + key], value)


def test_older_checkpoints(run):
    """``adapter`` was the name of the fusion, and one number stood for the frames of all encoders."""
    groups = checkpoint(load(MODELS[0])[0])
    expected = {key: value.clone() for key, value in load_vid(**run).model.state_dict().items()}
    fusion = groups.pop("feature_fusion")
    path = run["model_id_or_path"] / "checkpoints/latest-checkpoint.pt"
    torch.save({"model": groups | {"adapter": fusion}}, path)
    state = load_vid(**run).model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_a_single_encoder_run(tmp_path):
    """Its projector is not numbered, and ``num_frames`` may be one number."""
    arguments = write_run(
        tmp_path,
        "model_concat_linear",
        video_backbone_ids=["dinov2-video-all-tokens"],
        num_frames=8,
        feature_fusion="first",
    )
    groups = checkpoint(load("model_concat_linear")[0])
    projector = {k.removeprefix("1."): v for k, v in groups.pop("projectors").items() if k.startswith("1.")}
    path = tmp_path / "run/checkpoints/latest-checkpoint.pt"
    torch.save({"model": groups | {"projector": projector}}, path)
    vidlm = load_vid(**arguments)
    assert vidlm.config.encoders == ["dinov2"]
    assert torch.equal(
        vidlm.model.video_model.tail.projectors[0].projector.projector.weight,
        projector["projector.projector.weight"],
    )


def test_keys_that_do_not_fit_are_listed(run):
    groups = checkpoint(load(MODELS[0])[0])
    projectors = dict(groups["projectors"])
    projectors["0.projector.projector.extra"] = projectors.pop("0.projector.projector.bias")
    projectors["1.projector.projector.weight"] = torch.zeros(3, 3)
    rewrite(run, projectors=projectors)
    with pytest.raises(CheckpointError) as error:
        load_vid(**run)
    assert "unknown keys: video_model.tail.projectors.0.projector.projector.extra" in str(error.value)
    assert "missing keys: video_model.tail.projectors.0.projector.projector.bias" in str(error.value)
    assert "projectors.1.projector.projector.weight [3, 3] for [64, 48]" in str(error.value)


def test_a_checkpoint_without_its_embedding(run):
    groups = checkpoint(load(MODELS[0])[0])
    llm = {key: value for key, value in groups["llm_backbone"].items() if "embed_tokens" not in key}
    rewrite(run, llm_backbone=llm)
    with pytest.raises(CheckpointError, match=r"missing keys: language_model\.model\.embed_tokens\.weight"):
        load_vid(**run)


def test_groups_that_are_missing_or_unknown_are_listed(run):
    path = run["model_id_or_path"] / "checkpoints/latest-checkpoint.pt"
    torch.save({"model": {"projectors": {}}}, path)
    with pytest.raises(CheckpointError, match="missing groups llm_backbone; it holds projectors"):
        load_vid(**run)
    rewrite(run, mystery={})
    load_vid(**run)  # an empty group is none
    rewrite(run, mystery={"weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="unknown groups mystery"):
        load_vid(**run)


def test_the_fusion_goes_by_its_newer_name(run):
    expected = {key: value.clone() for key, value in load_vid(**run).model.state_dict().items()}
    old = {key: torch.zeros_like(value) for key, value in checkpoint(load(MODELS[0])[0])["feature_fusion"].items()}
    rewrite(run, adapter=old)
    state = load_vid(**run).model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_what_a_run_leaves_out_is_merv_base(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": {"num_frames": [8, 8, 16, 8, 99]}}))
    run = read_run_config(tmp_path / "config.json")
    assert run["num_frames"] == [8, 8, 16, 8]
    assert run["arch_specifier"] == "no-align+3davg+linear"
    assert run["feature_fusion"] == "cross_attention_avg_lq"
    assert run["llm_backbone_id"] == "llama2-7b-pure"
    assert next(iter(run["video_backbone_ids"])) == "languagebind-video-noclass"


def test_one_encoder_twice(tmp_path):
    encoder_id = "dinov2-video-all-tokens"
    arguments = write_run(tmp_path, "model_concat_linear", video_backbone_ids=[encoder_id] * 2, num_frames=[8, 8])
    groups = checkpoint(load("model_concat_linear")[0])
    groups["projectors"] = {key: value for key, value in groups["projectors"].items() if key[0] in "01"}
    torch.save({"model": groups}, tmp_path / "run/checkpoints/latest-checkpoint.pt")
    vidlm = load_vid(**arguments)
    assert vidlm.config.encoders == ["dinov2", "dinov2_2"]
    first, second = vidlm.model.video_model.encoders.values()
    assert torch.equal(first.patch.weight, second.patch.weight)


def test_a_pickle_that_runs_code_is_refused(run, tmp_path):
    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"model": Attack()}, run["model_id_or_path"] / "checkpoints/latest-checkpoint.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of the reference"):
        load_vid(**run)
    assert not (tmp_path / "executed").exists()


def test_files_that_are_not_there(run, tmp_path):
    (run["model_id_or_path"] / "checkpoints/latest-checkpoint.pt").unlink()
    with pytest.raises(CheckpointError, match=r"latest-checkpoint\.pt: no such file"):
        load_vid(**run)
    (tmp_path / "hollow").mkdir()
    with pytest.raises(CheckpointError, match=r"hollow: no config\.json"):
        load_vid(tmp_path / "hollow")
    (tmp_path / "hollow/config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="model_type must be 'merv', got 'llama'"):
        load_vid(tmp_path / "hollow")
    (tmp_path / "hollow/config.json").write_text(json.dumps({"model": "x"}))
    with pytest.raises(CheckpointError, match="model must be an object, got 'x'"):
        load_vid(tmp_path / "hollow")
    (tmp_path / "hollow/config.json").write_text(json.dumps({"model": {"num_frames": [16]}}))
    with pytest.raises(CheckpointError, match=r"num_frames must be one for each of \['languagebind.* got \[16\]"):
        load_vid(tmp_path / "hollow")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"one of merv-tiny, merv-frozen, merv-full.*got 'merv-huge'"):
        load_vid("merv-huge")
    assert "merv-full" in available_models()


def test_our_own_directory_with_foreign_weights(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    tiny.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["stranger"] = tensors.pop("video_model.tail.fusion.Q")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unknown keys: stranger; missing keys: video_model\.tail\.fusion\.Q"):
        load_vid(tmp_path)


def test_saved_over_its_own_files(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    again = load_vid(tmp_path)
    again.save_pretrained(tmp_path)
    state = load_vid(tmp_path).model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in tiny.model.state_dict().items())
    assert all(torch.equal(again.model.state_dict()[key], value) for key, value in state.items())
    assert not list(tmp_path.glob(".saving-*"))


def test_a_later_save_takes_the_place_of_an_earlier_one(tmp_path):
    """Shards over a single file and back; transformers would read a stale single file first."""
    first, second = build_tiny(1), build_tiny(2)
    key = "language_model.lm_head.weight"
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path, max_shard_size="200KB")
    assert torch.equal(load_vid(tmp_path).model.state_dict()[key], second.model.state_dict()[key])
    (tmp_path / "model-of-mine.safetensors").touch()
    first.save_pretrained(tmp_path)
    assert torch.equal(load_vid(tmp_path).model.state_dict()[key], first.model.state_dict()[key])
    assert {path.name for path in tmp_path.glob("model*")} == {"model.safetensors", "model-of-mine.safetensors"}


def test_folders_of_chat_templates_are_saved_twice(tiny, tmp_path):
    again = load_vid("merv-tiny")
    again.processor.chat_template = {"default": "a", "other": "b"}
    again.save_pretrained(tmp_path)
    again.save_pretrained(tmp_path)
    assert (tmp_path / "additional_chat_templates/other.jinja").read_text() == "b"
    with pytest.raises(ValueError, match="push_to_hub must be False"):
        again.save_pretrained(tmp_path, push_to_hub=True)


def test_a_file_that_is_cut_short(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        load_vid(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json: must hold an object, got list"):
        load_vid(tmp_path)


def test_parts_that_are_named_must_be_used(golden_run):
    with pytest.raises(ValueError, match=r"must be left out for a model in our format"):
        load_vid("merv-tiny", llm_path="somewhere")
    paths = golden_run["encoder_paths"] | {"dinov3": "somewhere"}
    with pytest.raises(ValueError, match=r"encoders must be among languagebind-video-noclass, .*, got dinov3"):
        load_vid(**golden_run | {"encoder_paths": paths})


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere", "/a/b", ""])
def test_a_missing_directory_is_not_taken_for_a_hub_id(name):
    with pytest.raises(ValueError, match="must be a directory, a hub id or one of"):
        load_vid(name)


def test_the_video_model_alone(tiny, clips, tmp_path):
    """AutoModel reads the part that makes visual tokens and leaves the language model in the file."""
    tiny.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    assert isinstance(model, MervVideoModel)
    frames = tiny.processor(videos=str(clips[0]))["pixel_values_videos"]
    with torch.no_grad():
        assert torch.equal(model(frames).pooler_output[0], tiny.encode(clips[0]).tokens)


def test_dtype(golden_run):
    assert load_vid(**golden_run).dtype == torch.float32
    vidlm, config = load_vid(**golden_run, dtype=torch.bfloat16, get_model_cfg=True)
    assert {p.dtype for p in vidlm.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in vidlm.model.modules())
    assert config.model_id == "golden"


def test_a_tokenizer_that_has_no_video_token_gets_one(golden_run, clips, tmp_path):
    """As LLaMA-2's; here its number even lies behind the embedding's last row."""
    shutil.copytree(golden_run["llm_path"], tmp_path / "llm")
    byte_tokenizer(320, video_token="<other>").save_pretrained(tmp_path / "llm")
    vidlm = load_vid(**golden_run | {"llm_path": tmp_path / "llm"})
    assert vidlm.config.video_token_id == vidlm.processor.video_token_id == 320
    asked = {"do_sample": False, "max_new_tokens": 8}
    expected = load_vid(**golden_run).generate(clips[0], "In: Why?\nOut:", **asked)
    assert vidlm.generate(clips[0], "In: Why?\nOut:", **asked) == expected


def test_llama2_prompts_are_cut_as_its_own_tokenizer_file_says(golden_run, tmp_path):
    """Its normaliser puts a space before every piece of text, also behind ``</s>``; a rebuilt tokenizer does not."""
    special = ["<PAD>", "<s>", "</s>"]
    letters = ["\u2581", *sorted(set("In: What?\nOut: A person rides.Which way do they go?<video>"))]
    file = Tokenizer(models.BPE({token: index for index, token in enumerate(special + letters)}, [], unk_token="<PAD>"))
    file.add_special_tokens(special)
    file.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    file.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    shutil.copytree(golden_run["llm_path"], tmp_path / "llm")
    file.save(str(tmp_path / "llm/tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": False}
    (tmp_path / "llm/tokenizer_config.json").write_text(json.dumps(settings))
    vidlm = load_vid(**golden_run | {"llm_path": tmp_path / "llm"})
    vidlm.save_pretrained(tmp_path / "ours")
    for loaded in (vidlm, load_vid(tmp_path / "ours")):
        for text in (
            "In: What?\nOut:",
            "In: What?\nOut: A person rides.</s>In: Which way?\nOut:",
            "In: a\n<video>\nOut:",
        ):
            assert loaded.tokenizer(text).input_ids == file.encode(text).ids
