import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import merv_fast.runtime.concurrent as concurrent
from merv_fast.runtime.concurrent import ConcurrentEncoders, share_out
from tests.runtime.happens_before import Recorded, RecordingStreams

GPU = [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.fixture
def gpus(monkeypatch):
    """Streams that are written down, and modules of a cost, whose weights count as lying on a GPU."""
    streams = RecordingStreams()
    places = {}
    monkeypatch.setattr(concurrent, "device_of", lambda module, x: places[module])
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **kwargs: x)

    def encoders(*costs, devices=None, **kwargs):
        modules = [Recorded(streams, factor, cost) for factor, cost in enumerate(costs, 2)]
        places.update(zip(modules, devices or [GPU[0]] * len(costs), strict=True))
        return ConcurrentEncoders(modules, streams=streams, **kwargs)

    return streams, encoders


def given_inputs(streams, count):
    inputs = [torch.full((4,), float(number)) for number in range(count)]
    for x in inputs:
        streams.write(x)
    return inputs


def test_every_encoder_has_its_stream_and_nothing_is_read_too_early(gpus):
    streams, make = gpus
    encoders = make(10, 40, 20)
    for _ in range(2):
        inputs = given_inputs(streams, 3)
        outputs = encoders(inputs)
        for x, y, factor in zip(inputs, outputs, (2, 3, 4), strict=True):
            streams.read(y)
            assert torch.equal(y, x * factor)
    ran_on = [module.ran_on for module in encoders.modules()]
    assert len({name for names in ran_on for name in names}) == 3
    # The same streams again: whoever makes new ones each time runs out of them.
    assert all(names[0] == names[1] for names in ran_on)
    assert streams.waits[:3] == [(stream, "caller") for stream in ("cuda:0/0", "cuda:0/1", "cuda:0/2")]


def test_fewer_lanes_are_shared_by_cost(gpus):
    streams, make = gpus
    encoders = make(10, 40, 20, lanes=2)
    inputs = given_inputs(streams, 3)
    for y in encoders(inputs):
        streams.read(y)
    assert [lane[2] for lane in encoders.plan([GPU[0]] * 3)] == [[1], [2, 0]]
    small, large, middle = (module.ran_on for module in encoders.modules())
    assert small == middle != large


def test_measured_costs_take_the_place_of_parameters(gpus):
    _, make = gpus
    encoders = make(10, 40, 20, lanes=2)
    encoders.costs = [9.0, 1.0, 2.0]
    assert [lane[2] for lane in encoders.plan([GPU[0]] * 3)] == [[0], [2, 1]]


def test_encoders_on_two_gpus(gpus):
    streams, make = gpus
    encoders = make(1, 2, 3, devices=[GPU[1], GPU[0], GPU[1]])
    for y in encoders(given_inputs(streams, 3)):
        streams.read(y)
    assert [module.ran_on[0] for module in encoders.modules()] == ["cuda:1/1", "cuda:0/0", "cuda:1/0"]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_after_an_error_the_caller_still_waits_for_all_that_was_started(gpus, failing):
    streams, make = gpus
    encoders = make(3, 2, 1)
    encoders.modules()[failing].fails = True
    with pytest.raises(RuntimeError, match="the encoder's own error"):
        encoders(given_inputs(streams, 3))
    assert streams.active == "caller"
    started = [waiting for waiting, awaited in streams.waits if awaited == "caller"]
    assert [awaited for waiting, awaited in streams.waits if waiting == "caller"] == started
    assert len(started) == failing + 1


def test_the_checker_sees_what_is_forgotten(gpus, monkeypatch):
    streams, make = gpus
    for forgotten, words in (("wait", "does not wait"), ("keep", "may go")):
        with monkeypatch.context() as patch:
            patch.setattr(streams, forgotten, lambda *args: None)
            with pytest.raises(AssertionError, match=words):
                make(1, 2)(given_inputs(streams, 2))


def test_on_a_cpu_one_after_another_bit_for_bit():
    torch.manual_seed(0)
    modules = {name: torch.nn.Linear(16, width) for name, width in (("a", 8), ("b", 3))}
    inputs = [torch.randn(5, 16), torch.randn(2, 16)]
    for encoders in (modules, torch.nn.ModuleDict(modules), list(modules.values())):
        outputs = ConcurrentEncoders(encoders)(inputs)
        expected = [module(x) for module, x in zip(modules.values(), inputs, strict=True)]
        assert all(torch.equal(y, e) for y, e in zip(outputs, expected, strict=True))


def test_outputs_may_be_nested():
    class Pair(torch.nn.Module):
        def forward(self, x):
            return {"tokens": x + 1, "pooled": (x.sum(),)}

    (output,) = ConcurrentEncoders([Pair()])([torch.ones(3)])
    assert output["pooled"][0].item() == 3


def test_measuring_on_a_cpu():
    encoders = ConcurrentEncoders([torch.nn.Linear(4, 4), torch.nn.Linear(512, 4096)])
    small, large = encoders.measure([torch.ones(1, 4), torch.ones(256, 512)])
    assert 0 < small < large
    assert encoders.costs == [small, large]


def test_several_threads():
    torch.manual_seed(0)
    encoders = ConcurrentEncoders([torch.nn.Linear(32, 32) for _ in range(3)])
    inputs = [[torch.randn(4, 32) for _ in range(3)] for _ in range(8)]
    expected = [encoders(x) for x in inputs]
    got = [None] * 8

    def run(number):
        for _ in range(20):
            got[number] = encoders(inputs[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for x, y in zip(got, expected, strict=True) for a, b in zip(x, y, strict=True))


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="encoders must be at least one"):
        ConcurrentEncoders([])
    with pytest.raises(ValueError, match="lanes must be at least 1, got 0"):
        ConcurrentEncoders([torch.nn.Identity()], lanes=0)
    with pytest.raises(ValueError, match="inputs must be 1, one per encoder, got 2"):
        ConcurrentEncoders([torch.nn.Identity()])([torch.ones(1)] * 2)


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=9), st.integers(1, 6))
def test_shares_are_fair(costs, groups):
    shares = share_out(costs, groups)
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    assert len(shares) == min(groups, len(costs))
    sums = [sum(costs[index] for index in share) for share in shares]
    # Graham's bound for the largest first.
    best = max(max(costs), sum(costs) / len(shares))
    assert max(sums) <= best * 4 / 3 + max(costs) * (len(costs) > len(shares)) + 1e-9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_two_hundred_runs_on_a_gpu_are_those_of_one_after_another():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(n, n, device="cuda", dtype=torch.bfloat16) for n in (512, 1024, 2048)]
    modules = [torch.nn.Sequential(*[layer] * 8) for layer in layers]
    encoders = ConcurrentEncoders(modules)
    with torch.inference_mode():
        for _ in range(200):
            inputs = [torch.randn(256, n, device="cuda").bfloat16() for n in (512, 1024, 2048)]
            outputs = encoders(inputs)
            expected = [module(x) for module, x in zip(modules, inputs, strict=True)]
            assert all(torch.equal(y, e) for y, e in zip(outputs, expected, strict=True))
            del inputs, outputs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_captured_in_a_graph():
    torch.manual_seed(0)
    encoders = ConcurrentEncoders([torch.nn.Linear(64, 64, device="cuda") for _ in range(3)])
    inputs = [torch.randn(8, 64, device="cuda") for _ in range(3)]
    with torch.inference_mode():
        expected = encoders(inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = encoders(inputs)
        for _ in range(20):
            graph.replay()
            assert all(torch.equal(y, e) for y, e in zip(outputs, expected, strict=True))
