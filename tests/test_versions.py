import pytest
import torch
from torch import nn

import merv_fast.versions
from merv_fast.versions import Versions


def test_same_until_written_to():
    tensors = [torch.zeros(3), nn.Parameter(torch.zeros(2))]
    versions = Versions(tensors)
    assert versions.same(tensors)
    with torch.no_grad():
        tensors[1].add_(1)
    assert not versions.same(tensors)


@pytest.mark.parametrize("write", ["step", "load", "cast", "data"])
def test_sees_every_way_that_weights_change(write):
    module = nn.Linear(2, 2)
    versions = Versions(list(module.parameters()))
    match write:
        case "step":
            module(torch.ones(1, 2)).sum().backward()
            torch.optim.SGD(module.parameters(), lr=1.0).step()
        case "load":
            module.load_state_dict(nn.Linear(2, 2).state_dict())
        case "cast":
            module.double()
        case "data":
            module.weight.data = torch.zeros(2, 2)
    assert not versions.same(list(module.parameters()))


def test_another_tensor_in_its_place_is_not_the_same():
    versions = Versions([torch.zeros(3)])
    assert not versions.same([torch.zeros(3)])
    assert not Versions([]).same([torch.zeros(3)])


def test_tensors_without_versions_are_never_the_same():
    with torch.inference_mode():
        made = torch.zeros(3)
        assert not Versions([made]).same([made])
    plain = torch.zeros(3)
    assert Versions([plain]).same([plain])


def test_nothing_is_kept_of_a_captured_graph(monkeypatch):
    tensor = torch.zeros(3)
    before = Versions([tensor])
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    during = Versions([tensor])
    # What the graph would read could be freed before it is replayed.
    assert not before.same([tensor])
    monkeypatch.undo()
    assert before.same([tensor])
    assert not during.same([tensor])


def test_each_stream_has_its_own(monkeypatch):
    now = [1]
    monkeypatch.setattr(merv_fast.versions, "_stream", lambda tensors: now[0])
    tensor = torch.zeros(3)
    versions = Versions([tensor])
    assert versions.same([tensor])
    now[0] = 2
    assert not versions.same([tensor])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_streams_of_a_gpu():
    tensor = torch.zeros(3, device="cuda")
    versions = Versions([tensor])
    assert versions.same([tensor])
    with torch.cuda.stream(torch.cuda.Stream()):
        assert not versions.same([tensor])
