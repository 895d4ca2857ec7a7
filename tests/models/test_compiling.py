"""use_compile: which encoders' blocks are compiled, how often, and that they compute the same."""

import copy

import pytest
import torch

import merv_fast
from merv_fast.models.identity import model_identity
from merv_fast.runtime.cache import VideoCache
from tests.budgets import GOLDEN, relative_error


@pytest.fixture
def video_model(tiny):
    model = tiny.model.video_model
    yield model
    model.use_compile(False)


@pytest.fixture
def inputs(video_model):
    configs = video_model.encoder_configs.values()
    return [torch.randn(1, c.num_frames, 3, c.recipe.size, c.recipe.size) for c in configs]


class Backend:
    """Compiles nothing, and counts what it is given."""

    def __init__(self):
        torch._dynamo.reset()
        self.graphs = 0

    def __call__(self, module, example_inputs):
        self.graphs += 1
        return module.forward


@torch.no_grad()
def test_all_blocks_of_an_encoder_are_one_graph(video_model, inputs):
    right = video_model.encode(inputs)
    backend = Backend()
    video_model.use_compile({"dinov2"}, backend=backend)
    assert video_model.compiled == ["dinov2"]
    assert len(video_model.encoders["dinov2"].blocks) > 1
    for _ in range(2):
        got = video_model.encode(inputs)
        assert all(relative_error(a, b) < GOLDEN for a, b in zip(got, right, strict=True))
        assert backend.graphs == 1
    rows = {choice.part: choice.runs for choice in merv_fast.explain(video_model)}
    assert [name for name, runs in rows.items() if runs.endswith(", compiled")] == ["encoder dinov2"]


@torch.no_grad()
def test_what_was_compiled_is_as_before_without(video_model, inputs):
    right = video_model.encode(inputs)
    backend = Backend()
    video_model.use_compile(backend=backend)
    assert video_model.compiled == list(video_model.encoders)
    video_model.use_compile({"siglip"}, backend=backend)
    assert video_model.compiled == ["siglip"]
    assert copy.deepcopy(video_model).compiled == []
    video_model.use_compile(False)
    assert video_model.compiled == []
    got = video_model.encode(inputs)
    assert backend.graphs == 0
    assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))


@pytest.mark.parametrize("keep", ["tokens", "features"])
def test_what_compiled_encoders_make_is_kept_apart(video_model, keep):
    cache = VideoCache(keep=keep)
    found = [model_identity(video_model, cache)]
    for names in ({"dinov2"}, {"siglip"}, True):
        video_model.use_compile(names)
        found.append(model_identity(video_model, cache))
    video_model.use_compile(False)
    torch.use_deterministic_algorithms(True)
    try:
        found.append(model_identity(video_model, cache))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(set(found)) == 5
    assert model_identity(video_model, cache) == found[0]


def test_no_such_encoder(video_model):
    with pytest.raises(ValueError, match=r"encoders must be among .*siglip, got clip"):
        video_model.use_compile({"clip"})
    assert video_model.compiled == []
