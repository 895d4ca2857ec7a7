"""Published names are found on the hub: here in a cache laid out like huggingface_hub's, without a network."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest

from merv_fast import load_vid
from merv_fast.models.llms import LLMS

REVISION = "0123456789abcdef0123456789abcdef01234567"
GREEDY = {"do_sample": False, "max_new_tokens": 8}


def publish(cache: Path, repo: str, source: Path, under: str = "") -> None:
    """Put the files of ``source`` into the cache as those of ``repo``."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(source, folder / "snapshots" / REVISION / under, dirs_exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs/main").write_text(REVISION)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_published_model_by_id_and_title(golden_run, clips, tmp_path, offline):
    publish(tmp_path, "tyleryzhu/merv", golden_run["model_id_or_path"], "merv-full")
    publish(tmp_path, LLMS["llama2-7b-pure"].hub_id, golden_run["llm_path"])
    for encoder_id, path in golden_run["encoder_paths"].items():
        config = golden_run["encoder_configs"][encoder_id]
        publish(tmp_path, config.source, path)
        snapshot = tmp_path / f"models--{config.source.replace('/', '--')}/snapshots" / REVISION
        (snapshot / "pytorch_model.bin").rename(snapshot / config.files[-1])
    configs = golden_run["encoder_configs"]
    expected = load_vid(**golden_run).generate(clips[0], "In: Why?\nOut:", **GREEDY)
    for name in ("merv-full", "MERV Full"):
        vidlm = load_vid(name, hf_token="hf_x", cache_dir=tmp_path, encoder_configs=configs)
        assert vidlm.generate(clips[0], "In: Why?\nOut:", **GREEDY) == expected


def test_our_format_by_hub_id(tiny, clips, tmp_path, offline):
    tiny.save_pretrained(tmp_path / "local")
    publish(tmp_path, "someone/some-merv", tmp_path / "local")
    vidlm = load_vid("someone/some-merv", cache_dir=tmp_path)
    assert vidlm.generate(clips[0], "In: Why?\nOut:", **GREEDY) == tiny.generate(clips[0], "In: Why?\nOut:", **GREEDY)


def test_what_is_not_there_is_named(golden_run, tmp_path, offline):
    publish(tmp_path, "tyleryzhu/merv", golden_run["model_id_or_path"], "merv-full")
    with pytest.raises(
        FileNotFoundError, match=r"LanguageBind_Video_merge: none of model\.safetensors, .* a local path"
    ):
        load_vid("merv-full", cache_dir=tmp_path, encoder_configs=golden_run["encoder_configs"])
