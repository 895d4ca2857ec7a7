"""The model for lmms-eval, with a stand-in for the two of its modules that are used.

The stand-in has their names; lmms-eval itself has not run this in these tests.
"""

import importlib
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from merv_fast import load_vid, sample_clip
from merv_fast.integrations.evaluation.run import prompt_of

NAME = "merv_fast.integrations.lmms_eval.model"
Image = pytest.importorskip("PIL.Image")


class Lmms:
    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@pytest.fixture
def lmms_eval(monkeypatch):
    modules = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, values in modules.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules.pop(NAME, None)
    yield
    sys.modules.pop(NAME, None)


@pytest.fixture
def model(lmms_eval):
    pytest.importorskip("accelerate")
    return importlib.import_module(NAME).Merv("merv-tiny", device="cpu", batch_size="2")


def requests(model, visuals, settings):
    """One request for each list of visuals, as lmms-eval makes them."""
    model.task_dict = {"task": {"test": [{"visual": visual} for visual in visuals]}}
    return [
        SimpleNamespace(args=(f"What is {place}?", settings[place], lambda doc: doc["visual"], place, "task", "test"))
        for place in range(len(visuals))
    ]


def test_it_is_found(lmms_eval):
    (entry,) = entry_points(group="lmms_eval.models", name="merv_fast")
    manifest = entry.load()()
    assert manifest.model_id == "merv_fast"
    module, _, name = manifest.simple_class_path.rpartition(".")
    assert issubclass(getattr(importlib.import_module(module), name), Lmms)


def test_answers(model):
    clip, picture = str(sample_clip()), Image.fromarray(np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3))
    short, sampled = {"max_new_tokens": 4, "temperature": 0, "until": ["\n\n"]}, {"max_new_tokens": 2, "top_p": None}
    settings = [short, sampled, short, short, sampled]
    got = model.generate_until(requests(model, [[clip], [clip], [picture], [clip], [picture, picture]], settings))
    vidlm = load_vid("merv-tiny")
    frames = torch.from_numpy(np.array(picture)).expand(max(vidlm.config.num_frames), -1, -1, -1)
    for place, (text, settings_of) in enumerate(zip(got, settings, strict=True)):
        video = frames if place in (2, 4) else clip
        count = settings_of["max_new_tokens"]
        right = vidlm.generate(video, prompt_of(vidlm, f"What is {place}?"), max_new_tokens=count, do_sample=False)
        assert text == right


def test_an_answer_ends_at_its_mark(model):
    cut = sys.modules[NAME].cut
    assert cut("one\n\ntwo", ["\n\n", ""]) == "one"
    assert cut("one. two", "two") == "one. "
    assert cut("one", ()) == "one"


def test_a_bad_video_is_answered_by_nothing(model, tmp_path, caplog):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    settings = [{"max_new_tokens": 2}] * 2
    empty, text = model.generate_until(requests(model, [[str(bad)], [str(sample_clip())]], settings))
    assert empty == ""
    assert text
    assert "answered by nothing" in caplog.text
    assert "bad.mp4" in caplog.text


def test_what_it_cannot_do(model):
    with pytest.raises(NotImplementedError, match="must be of generate_until, got loglikelihood"):
        model.loglikelihood([])
    with pytest.raises(ValueError, match=r"visuals must be one video, or pictures, got \['str', 'str'\]"):
        model.generate_until(requests(model, [["a.mp4", "b.mp4"]], [{}]))
    with pytest.raises(TypeError, match="unexpected keyword argument 'frames'"):
        sys.modules[NAME].Merv("merv-tiny", frames=8)
