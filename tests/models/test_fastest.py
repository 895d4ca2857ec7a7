"""use_fastest: what is tried, what is chosen, and what is left after an error; on a clock that is played."""

import copy

import pytest
import torch

import merv_fast
from merv_fast.models import fastest
from merv_fast.models.fastest import WAYS, use_fastest
from tests.models.test_front_end_graphs import frames_of, graphs  # noqa: F401


@pytest.fixture
def video_model(tiny):
    model = tiny.model.video_model
    yield model
    model.use_graphs(None)
    model.use_compile(False)
    model.ways, model.concurrent.costs = {}, None


@pytest.fixture
def takes(monkeypatch, video_model):
    """Says how long each way takes; ways are compiled by nothing."""
    compile_blocks = video_model.use_compile
    monkeypatch.setattr(
        video_model, "use_compile", lambda encoders=True: compile_blocks(encoders, backend="eager"), raising=False
    )

    def played(**milliseconds):
        def measure(model, inputs):
            assert [len(x) for x in inputs] == [1] * len(model.encoders)
            has = model.graphs is not None, bool(model.compiled)
            return milliseconds[next(name for name, way in WAYS.items() if way == has).replace(", ", "_")]

        monkeypatch.setattr(fastest, "measure", measure)

    return played


def state(model):
    return model.graphs is not None, model.compiled


@pytest.mark.parametrize(
    ("milliseconds", "chosen"),
    [
        ({"plain": 10, "graphs": 8, "compiled": 9, "compiled_graphs": 7}, "compiled, graphs"),
        ({"plain": 10, "graphs": 8, "compiled": 9, "compiled_graphs": 7.9}, "graphs"),
        ({"plain": 10, "graphs": 9.8, "compiled": 12, "compiled_graphs": 12}, "plain"),
        ({"plain": 10, "graphs": 12, "compiled": 6, "compiled_graphs": 12}, "compiled"),
    ],
)
def test_the_least_time_wins_and_of_equals_the_simplest(video_model, graphs, takes, milliseconds, chosen):  # noqa: F811
    takes(**milliseconds)
    found = use_fastest(video_model)
    assert next(iter(found)) == chosen
    assert found == {name.replace("_", ", "): value for name, value in milliseconds.items()}
    wants_graphs, wants_blocks = WAYS[chosen]
    assert state(video_model) == (wants_graphs, list(video_model.encoders) if wants_blocks else [])
    (why,) = (choice.why for choice in merv_fast.explain(video_model) if choice.part == "encoders")
    assert f"; measured for one video: {chosen} {found[chosen]:.1f} ms, " in why


def test_what_cannot_be_captured_and_is_not_to_be_compiled_is_not_tried(video_model, takes):
    takes(plain=2, compiled=1)
    assert use_fastest(video_model) == {"compiled": 1, "plain": 2}
    assert use_fastest(video_model, compiled=False) == {"plain": 2}
    assert state(video_model) == (False, [])


def test_after_an_error_all_is_as_before(video_model, graphs, takes, monkeypatch):  # noqa: F811
    video_model.use_graphs(3)
    video_model.use_compile({"dinov2"})

    def fails(model, inputs):
        raise RuntimeError("no")

    monkeypatch.setattr(fastest, "measure", fails)
    with pytest.raises(RuntimeError, match="no"):
        use_fastest(video_model)
    assert state(video_model) == (True, ["dinov2"])
    assert video_model.graphs.encode.max_graphs == 3
    assert video_model.ways == {}


def test_the_time_is_that_of_encoding(video_model, monkeypatch):
    now = [0.0]
    times = iter([500, 100, *([30] * 5), 70, *([40] * 4)])

    def encode(inputs):
        now[0] += next(times) / 1e3

    monkeypatch.setattr(fastest.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(video_model, "encode", encode)
    # The first two are not counted.
    assert fastest.measure(video_model, []) == pytest.approx(35)


def test_what_was_chosen_is_what_runs(video_model):
    frames = frames_of(video_model, 1)
    with torch.no_grad():
        expected = video_model(frames).pooler_output
    assert list(use_fastest(video_model, compiled=False)) == ["plain"]
    with torch.no_grad():
        assert torch.equal(video_model(frames).pooler_output, expected)


def test_models_that_cannot_be_measured(video_model):
    for other, got in (
        (copy.deepcopy(video_model).train(), "one in training mode"),
        (copy.deepcopy(video_model).to("meta"), "one on meta"),
    ):
        with pytest.raises(ValueError, match=f"use_fastest: model must be in evaluation mode on a device, got {got}"):
            use_fastest(other)
