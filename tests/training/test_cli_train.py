"""``merv-fast train``: its options reach `train`, and what is wrong is one line."""

import json

import pytest
from typer.testing import CliRunner

import merv_fast
from merv_fast.cli.app import app
from merv_fast.cli.train import parse_settings
from tests.training.small import QUICK, conversation, small_model, write_data

runner = CliRunner()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directory of a small model."""
    folder = tmp_path_factory.mktemp("base")
    small_model().save_pretrained(folder)
    return folder


def sets(**settings):
    return [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def invoke(*arguments):
    return runner.invoke(app, ["train", *map(str, arguments)])


def test_align_then_finetune_then_resume(base, data, tmp_path):
    common = QUICK | {"global_batch_size": 16, "per_device_train_batch_size": 8, "save_strategy": "steps"}
    first = invoke("align", data, "--model", base, "--out", tmp_path / "align", *sets(**common, max_steps=2))
    assert first.exit_code == 0, first.output
    assert "2 steps; loss" in first.stdout
    more = [*sets(**common, max_steps=2, save_steps=1), "--cache", tmp_path / "cache"]
    second = invoke("finetune", data, "--model", tmp_path / "align", "--out", tmp_path / "tuned", *more)
    assert second.exit_code == 0, second.output
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 16
    more = [*sets(**common, max_steps=3), "--resume", "--cache", tmp_path / "cache"]
    third = invoke("finetune", data, "--model", tmp_path / "align", "--out", tmp_path / "tuned", *more)
    assert third.exit_code == 0, third.output
    history = json.loads((tmp_path / "tuned" / "history.json").read_text())
    assert (history["stage"], history["steps"]) == ("finetune", 3)
    assert merv_fast.load_vid(tmp_path / "tuned").config.trained


def test_skipped_entries_are_reported(base, clips, tmp_path):
    data = write_data(tmp_path, [conversation("A", video=str(clips[0])), conversation("B", video="absent.mp4")])
    settings = sets(**QUICK, max_steps=1, global_batch_size=2, per_device_train_batch_size=2)
    done = invoke("align", data, "--model", base, "--out", tmp_path / "out", "--on-error", "skip", *settings)
    assert done.exit_code == 0, done.output
    assert "skipped 1 time(s): " in done.stderr
    assert "absent.mp4" in done.stderr


def test_what_is_wrong_with_the_data_is_said_before_the_model_is_loaded(tmp_path):
    data = write_data(tmp_path, [conversation("B", video="absent.mp4", id="b")])
    done = invoke("align", data, "--model", "/nowhere", "--out", tmp_path / "out")
    assert "entry b: " in str(done.exception)
    assert "absent.mp4 does not exist" in str(done.exception)


def test_settings_are_json_or_text():
    given = ["learning_rate=1e-3", "fsdp=true", 'fsdp_config={"version": 2}', "deepspeed=zero.json", "optim=sgd"]
    expected = {"learning_rate": 1e-3, "fsdp": True, "fsdp_config": {"version": 2}}
    assert parse_settings(given) == expected | {"deepspeed": "zero.json", "optim": "sgd"}
    assert parse_settings(None) == {}


def test_a_setting_must_have_a_value(base, data, tmp_path):
    done = invoke("align", data, "--out", tmp_path / "out", "--set", "max_steps")
    assert done.exit_code == 2
    assert "KEY=VALUE" in done.stderr


def test_an_unknown_setting_is_refused(base, data, tmp_path):
    done = invoke("align", data, "--model", base, "--out", tmp_path / "out", "--set", "max_step=3")
    assert "max_step" in str(done.exception)
    assert isinstance(done.exception, TypeError)


def test_accelerate_is_asked_for(monkeypatch, data, tmp_path):
    import merv_fast.cli.train as command

    monkeypatch.setattr(command, "is_accelerate_available", lambda: False)
    done = invoke("align", data, "--out", tmp_path / "out")
    assert str(done.exception) == "train needs accelerate: pip install 'merv-fast[train]'"
