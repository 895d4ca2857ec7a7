import copy
import logging
import threading
import time

import pytest
import torch
from torch.utils._pytree import tree_leaves

import merv_fast.runtime.concurrent as concurrent
import merv_fast.runtime.graphs
import merv_fast.versions
from merv_fast.modules import Tail, build_fusion, build_projector, set_attention
from merv_fast.modules.attention import HeadAttention
from merv_fast.runtime.concurrent import ConcurrentEncoders
from merv_fast.runtime.front_end import FrontEndGraphs
from merv_fast.runtime.graphs import CUDA_GRAPHS, GraphedCall, GraphPool
from merv_fast.runtime.parts import Parts
from tests.runtime.happens_before import Recorded, RecordingGraphs

GPU = torch.device("cuda", 0)


class Scaled(Recorded):
    """Times a weight, which is read where it is; fails if it is captured, should that be wanted."""

    captured_fails = False

    def forward(self, x):
        if self.captured_fails and self.streams.in_capture:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        y = super().forward(x)
        out = y * self.weight[0]
        self.streams.write(out)
        return out


@pytest.fixture
def graphs(monkeypatch):
    """Graphs that are written down; modules count as lying on a GPU."""
    monkeypatch.setattr(concurrent, "device_of", lambda module, x: GPU)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **kwargs: x)
    return RecordingGraphs()


@pytest.fixture
def make(graphs):
    """Makes two encoders in graphs: the first doubles, the second trebles."""

    def made(**kwargs):
        encoders = torch.nn.ModuleList(Scaled(graphs, factor) for factor in (2, 3)).eval()
        graphs.modules = list(encoders)
        return GraphedCall(ConcurrentEncoders(encoders, streams=graphs), encoders, graphs=graphs, **kwargs)

    return made


def given(graphs, value, rows=4, dtype=torch.float32):
    inputs = [torch.full((rows, 2), float(value + number), dtype=dtype) for number in range(2)]
    for x in inputs:
        graphs.write(x)
    return inputs


def right(graphs, call, value, factor=1.0, **kwargs):
    """Whether a call without gradients gives what it must, all of it written before the caller reads it."""
    inputs = given(graphs, value, **kwargs)
    with torch.no_grad():
        outputs = call(inputs)
    for y in outputs:
        graphs.read(y)
    return all(torch.equal(y, x * n * factor) for x, y, n in zip(inputs, outputs, (2, 3), strict=True))


def test_one_capture_and_then_replays(graphs, make):
    call = make()
    assert all(right(graphs, call, value) for value in range(5))
    assert (graphs.captures, graphs.replays) == (1, 5)
    assert [bucket.replays for bucket in call.buckets] == [5]
    # Two warm-ups, the capture, and what the replays do; all beside the caller.
    assert all(module.ran_on == [f"cuda:0/{lane}"] * 8 for lane, module in enumerate(graphs.modules))


def test_calls_from_several_streams(graphs, make):
    call = make()
    graphs.side("other", 0)
    for value in range(3):
        assert right(graphs, call, value)
        with graphs.use("other/0"):
            assert right(graphs, call, value + 10)
    assert graphs.captures == 1


@pytest.mark.parametrize(
    ("forgotten", "words"),
    [("wait", "does not wait"), ("keep", "may go"), ("copy", "nothing has written"), ("replay", "nothing has written")],
)
def test_the_checker_sees_what_is_forgotten(graphs, make, monkeypatch, forgotten, words):
    call = make()
    call.try_out(given(graphs, 1))
    monkeypatch.setattr(graphs, forgotten, lambda *args: None)
    with pytest.raises(AssertionError, match=words):
        right(graphs, call, 2)


def test_the_checker_sees_writing_over_what_is_read(graphs):
    x = torch.zeros(2)
    graphs.write(x)
    other = graphs.side("other", 0)
    graphs.wait(other, "caller")
    graphs.keep(x, other)
    with graphs.use(other):
        graphs.read(x)
    with pytest.raises(AssertionError, match="writes while"):
        graphs.write(x)
    graphs.wait("caller", other)
    with graphs.use(other):
        graphs.write(x)


def test_outputs_are_the_callers(graphs, make):
    call = make()
    with torch.no_grad():
        first = call(given(graphs, 1))
        kept = [y.clone() for y in first]
        second = call(given(graphs, 5))
    assert all(torch.equal(y, k) for y, k in zip(first, kept, strict=True))
    # Writing to them changes nothing either.
    for y in second:
        y.zero_()
    assert right(graphs, call, 5)
    # Nor do the inputs have to stay as they were.
    inputs = given(graphs, 3)
    with torch.no_grad():
        call(inputs)
    for x in inputs:
        graphs.write(x.zero_())


def test_the_layout_of_outputs_is_that_of_the_call(graphs):
    class Views(Recorded):
        def forward(self, x):
            out = super().forward(x).T
            views = {"transposed": out, "sliced": out[:, 1:], "expanded": out[:, :1].expand(-1, 3)}
            for y in views.values():
                self.streams.write(y)
            return views

    module = Views(graphs, 2).eval()
    call = GraphedCall(lambda inputs: module(inputs[0]), module, graphs=graphs)
    x = torch.arange(6.0).view(3, 2)
    graphs.write(x)
    with torch.no_grad():
        got, expected = call([x]), module(x)
    assert graphs.replays == 1
    assert all(torch.equal(got[name], y) for name, y in expected.items())
    assert all(got[name].stride() == expected[name].stride() for name in ("transposed", "sliced"))
    # Each element of what is expanded is the caller's own.
    assert got["expanded"].is_contiguous()


def test_each_shape_type_and_layout_is_a_graph(graphs, make):
    call = make(max_graphs=9)
    for _ in range(2):
        assert right(graphs, call, 1)
        assert right(graphs, call, 1, rows=2)
        assert right(graphs, call, 1, dtype=torch.float64)
    with torch.no_grad():
        call([x.T for x in given(graphs, 1, rows=2)])
    assert graphs.captures == 4


def test_settings_are_part_of_a_shape(graphs, make):
    call = make()
    assert right(graphs, call, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert right(graphs, call, 1)
    try:
        torch.backends.cuda.enable_flash_sdp(False)
        assert right(graphs, call, 1)
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    assert right(graphs, call, 1)
    assert graphs.captures == 3


def test_the_least_recently_used_is_dropped(graphs, make):
    call = make(max_graphs=2)
    for rows in (1, 2, 1, 3):
        assert right(graphs, call, 1, rows=rows)
    # For one that comes for the first time none is dropped.
    assert [bucket.shapes[0][0] for bucket in call.buckets] == [2, 1]
    assert right(graphs, call, 1, rows=3)
    assert [bucket.shapes[0][0] for bucket in call.buckets] == [1, 3]
    assert len(graphs.live) == 2
    assert right(graphs, call, 1, rows=1)
    assert graphs.captures == 3
    for _ in range(2):
        assert right(graphs, call, 1, rows=2)
    assert graphs.captures == 4


def test_more_shapes_in_turns_than_graphs_do_not_drive_each_other_out(graphs, make):
    call = make(max_graphs=4)
    for turn in range(40):
        assert right(graphs, call, 1, rows=1 + turn % 5)
    assert (graphs.captures, graphs.replays) == (4, 32)
    assert call.plain_calls == {"there is no room beside graphs of shapes that come more often": 8}


def test_shapes_that_do_not_fit_together_do_not_drive_each_other_out(graphs, make):
    graphs.growth = 3 << 20
    pool = GraphPool(5 << 20, graphs)
    call = make(pool=pool)
    for turn in range(20):
        assert right(graphs, call, 1, rows=1 + turn % 2)
    # Both, and the first again after both were dropped.
    assert (graphs.captures, graphs.replays) == (3, 10)
    # When the first does not come any more, there is room for the second.
    assert right(graphs, call, 1, rows=2)
    assert call.buckets == []
    assert right(graphs, call, 1, rows=2)
    assert [bucket.shapes[0][0] for bucket in call.buckets] == [2]


def test_one_graph_after_another_in_fresh_memory(graphs, make):
    call = make(max_graphs=1)
    assert all(right(graphs, call, 1, rows=rows) for rows in (1, 2, 2, 1, 1))
    assert graphs.captures == 3
    # A pool whose graphs are all gone cannot be named again.
    assert len(graphs.pools) == 3


def test_a_shape_for_which_there_was_no_memory_is_tried_again(graphs, make, monkeypatch):
    monkeypatch.setattr(merv_fast.runtime.graphs, "RETRY", 3)
    call = make()
    full = True

    def before():
        if full:
            raise torch.OutOfMemoryError("CUDA out of memory")

    graphs.before_capture = before
    for _ in range(5):
        assert right(graphs, call, 1)
    assert call.plain_calls == {"capture failed: OutOfMemoryError: CUDA out of memory": 5}
    full = False
    assert [right(graphs, call, 1) for _ in range(3)] == [True] * 3
    assert (graphs.captures, graphs.replays) == (0, 0)
    assert right(graphs, call, 1)
    assert (graphs.captures, graphs.replays) == (1, 1)


def test_a_trial_for_which_there_was_no_memory_decides_nothing(graphs, make, caplog):
    call = make()
    call.call, run = lambda inputs: 1 / 0, call.call

    def full(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    call.call = full
    with caplog.at_level(logging.WARNING, "merv_fast"):
        call.try_out(given(graphs, 1))
    assert caplog.messages == ["a CUDA graph could not be tried out: OutOfMemoryError: CUDA out of memory"]
    assert call.obstacle is None
    call.call = run
    assert right(graphs, call, 1)
    assert graphs.replays == 1


def test_a_graph_is_dropped_after_the_replays_of_other_streams(graphs, make):
    call = make()
    graphs.side("other", 0)
    assert right(graphs, call, 1)
    with graphs.use("other/0"):
        assert right(graphs, call, 2)
    # The caller's own stream has not waited for that one.
    call.clear()
    assert graphs.live == []


def test_what_is_known_is_of_the_module_as_it_is(graphs, make):
    call = make()
    assert right(graphs, call, 1)
    hook = graphs.modules[0].register_forward_hook(lambda *_: None)
    assert right(graphs, call, 1)
    assert "hooks" in call.obstacle
    hook.remove()
    call.check()
    assert (call.obstacle, call.buckets) == (None, [])


def test_weights_written_to_are_seen(graphs, make):
    call = make()
    assert right(graphs, call, 1)
    optimiser = torch.optim.SGD(call.module.parameters(), lr=1.0)
    for module in graphs.modules:
        module.weight.grad = torch.full((1,), -4.0)
    optimiser.step()
    assert right(graphs, call, 1, factor=5.0)
    assert graphs.captures == 1


def replace_data(call):
    for module in call.module:
        module.weight.data = torch.full((1,), 7.0)


def replace_by_loading(call):
    state = {name: torch.full((1,), 7.0) for name in call.module.state_dict()}
    call.module.load_state_dict(state, assign=True)


def replace_by_casting(call):
    call.module._apply(lambda x: x.double() * 7)


@pytest.mark.parametrize("replace", [replace_data, replace_by_loading, replace_by_casting])
def test_weights_that_were_replaced_are_captured_anew(graphs, make, replace):
    call = make()
    assert right(graphs, call, 1)
    replace(call)
    assert right(graphs, call, 1, factor=7.0)
    assert right(graphs, call, 2, factor=7.0)
    assert (graphs.captures, len(graphs.live)) == (2, 1)


def test_a_module_that_was_replaced_is_captured_anew(graphs, make):
    call = make()
    assert right(graphs, call, 1)
    call.module[0] = other = Scaled(graphs, 2).eval()
    other.weight = graphs.modules[0].weight
    assert right(graphs, call, 1)
    assert graphs.captures == 2
    assert other.ran_on


def test_modes_hooks_and_attention(graphs, make, caplog):
    call = make()
    call.module.append(torch.nn.ModuleList([HeadAttention(8)]).eval())
    call.call = lambda inputs, encoders=call.call.encoders[:2]: ConcurrentEncoders(encoders, streams=graphs)(inputs)
    call.plain = call.call
    assert right(graphs, call, 1)
    call.module.train()
    assert right(graphs, call, 1)
    assert call.obstacle == "the module is in training mode"
    assert str(call) == "no graphs: the module is in training mode"
    call.module.eval()
    assert right(graphs, call, 1)
    assert (call.obstacle, graphs.captures) == (None, 2)
    set_attention(call.module, "eager")
    assert right(graphs, call, 1)
    assert graphs.captures == 3
    hook = call.module[1].register_forward_hook(lambda *_: None)
    assert right(graphs, call, 1)
    assert call.obstacle == "modules have forward hooks, which a replay would not call"
    hook.remove()
    assert right(graphs, call, 1)
    assert (call.obstacle, graphs.captures) == (None, 4)
    assert caplog.messages == [
        "a call runs without a CUDA graph: the module is in training mode",
        "a call runs without a CUDA graph: modules have forward hooks, which a replay would not call",
    ]


def test_what_cannot_be_captured_is_found_out_by_a_trial(graphs, make):
    call = make()
    assert right(graphs, call, 1, rows=3)
    graphs.modules[1].captured_fails = True
    call.try_out(given(graphs, 0))
    assert call.obstacle == "capture failed: RuntimeError: operation not permitted when stream is capturing"
    assert graphs.active == "caller"
    assert right(graphs, call, 1)
    assert right(graphs, call, 1, rows=3)
    assert (graphs.captures, graphs.replays, graphs.live) == (2, 1, [])


def test_a_trial_counts_as_a_graph(graphs, make):
    call = make()
    call.try_out(given(graphs, 0))
    assert call.obstacle is None
    assert right(graphs, call, 1)
    assert (graphs.captures, graphs.replays) == (1, 1)


def test_a_shape_that_cannot_be_captured_runs_plainly(graphs, make, caplog):
    call = make()
    assert right(graphs, call, 1)
    graphs.modules[0].captured_fails = True
    assert right(graphs, call, 1, rows=3)
    assert right(graphs, call, 1, rows=3)
    assert graphs.captures == 2
    # That of the others stays.
    graphs.modules[0].captured_fails = False
    assert right(graphs, call, 2)
    assert graphs.replays == 2
    reason = "capture failed: RuntimeError: operation not permitted when stream is capturing"
    assert call.plain_calls == {reason: 2}
    assert caplog.messages == [f"a call runs without a CUDA graph: {reason}"]
    assert str(call) == f"1 of at most 4 graphs; [4, 2] 0 MiB, 2 replays; 2 plain: {reason}"
    # With other weights it is tried again.
    replace_data(call)
    assert right(graphs, call, 2, rows=3, factor=7.0)
    assert [bucket.shapes[0][0] for bucket in call.buckets] == [3]


def test_an_error_of_the_call_itself_reaches_the_caller(graphs, make):
    call = make()
    assert right(graphs, call, 1)
    graphs.modules[1].fails = True
    with torch.no_grad(), pytest.raises(RuntimeError, match="the encoder's own error"):
        call(given(graphs, 1, rows=3))
    assert graphs.active == "caller"
    graphs.modules[1].fails = False
    assert right(graphs, call, 1, rows=3)
    assert right(graphs, call, 2)


def test_with_gradients_it_is_the_plain_call(graphs, make, caplog):
    call = make()
    for _ in range(2):
        outputs = call(given(graphs, 1))
        assert all(y.requires_grad for y in outputs)
    assert (graphs.captures, call.plain_calls) == (0, {"gradients are enabled": 2})
    assert caplog.messages == ["a call runs without a CUDA graph: gradients are enabled"]


def test_inputs_elsewhere_or_empty(graphs, make):
    call = make(plain=lambda inputs: "plain")
    with torch.no_grad():
        assert call([torch.zeros(0, 2)] * 2) == "plain"
        assert call([torch.zeros(2, 2, device="meta")] * 2) == "plain"
    assert call.plain_calls == {"inputs must not be empty, and on cpu": 2}


def test_while_another_graph_is_captured_it_is_part_of_that(graphs, make):
    call = make()
    graphs.in_capture = True
    assert right(graphs, call, 1)
    assert (graphs.captures, call.plain_calls) == (0, {"another graph is captured": 1})


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_outputs_are_of_the_callers_mode(graphs, make, first):
    call = make()
    for mode in (first, torch.inference_mode, torch.no_grad):
        inputs = given(graphs, 1)
        with mode():
            outputs = call(inputs)
        assert [y.is_inference() for y in outputs] == [mode is torch.inference_mode] * 2
    assert graphs.captures == 1
    # Such outputs may be what is trained on.
    (outputs[0] * torch.ones(1, requires_grad=True)).sum().backward()


def test_memory_has_a_bound(graphs, make):
    graphs.growth = 3 << 20
    pool = GraphPool(7 << 20, graphs)
    call = make(pool=pool)
    assert right(graphs, call, 1, rows=1)
    assert right(graphs, call, 1, rows=2)
    assert 6 << 20 < pool.bytes < 7 << 20
    assert right(graphs, call, 1, rows=3)
    assert (pool.bytes, graphs.live) == (0, [])
    # Alone it fits.
    assert right(graphs, call, 1, rows=3)
    assert [bucket.shapes[0][0] for bucket in call.buckets] == [3]
    graphs.growth = 8 << 20
    call.clear()
    for _ in range(2):
        assert right(graphs, call, 1, rows=4)
    assert graphs.captures == 5
    assert list(call.plain_calls) == [
        "graphs take 9 MiB, max_bytes is 7 MiB: all were dropped",
        "graphs take 8 MiB, max_bytes is 7 MiB",
    ]


def test_threads_take_turns(graphs, make, monkeypatch):
    call, under_way, wrong = make(), [], []
    replay = graphs.replay

    def slow(graph):
        under_way.append(graph)
        time.sleep(0.001)
        assert len(under_way) == 1
        replay(graph)
        under_way.pop()

    monkeypatch.setattr(graphs, "replay", slow)

    def run(number):
        for turn in range(5):
            rows = 1 + (number + turn) % 2
            inputs = [torch.full((rows, 2), float(number + turn))] * 2
            with lock:
                graphs.write(inputs[0])
            with torch.no_grad():
                outputs = call(inputs)
            if not all(torch.equal(y, x * n) for x, y, n in zip(inputs, outputs, (2, 3), strict=True)):
                wrong.append((number, turn))

    # The recorder knows one caller.
    lock = threading.RLock()
    monkeypatch.setattr("merv_fast.runtime.graphs._ONE_AT_A_TIME", lock)
    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert graphs.replays == 40


def test_on_a_cpu_it_is_the_plain_call():
    layer = torch.nn.Linear(4, 2).eval()
    call = GraphedCall(lambda inputs: layer(inputs[0]), layer)
    x = torch.randn(3, 4)
    with torch.inference_mode():
        assert torch.equal(call([x]), layer(x))
    assert call.obstacle == "weights are on cpu, which has no CUDA graphs"


def test_where_weights_must_be(graphs):
    for module, words in (
        (torch.nn.Identity(), "there are no weights, by which to tell the device"),
        (
            torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1, device="meta")),
            "weights are on cpu and meta, and a graph is captured on one GPU",
        ),
    ):
        assert GraphedCall(lambda inputs: inputs, module.eval(), graphs=graphs).obstacle == words


def test_weights_that_wrap_others(graphs):
    class Wrapped(torch.Tensor):
        def data_ptr(self):
            raise RuntimeError("no storage")

    module = torch.nn.Module()
    module.register_buffer("weight", torch.zeros(2).as_subclass(Wrapped))
    call = GraphedCall(lambda inputs: inputs, module.eval(), graphs=graphs)
    assert call.obstacle == "weights are Wrapped, whose memory cannot be told"


def test_memory_that_is_had_again_in_another_type():
    module = torch.nn.BatchNorm1d(2)
    parts = Parts(module)
    before = parts.state()
    module.running_mean = module.running_mean.view(torch.int32)
    assert parts.state() != before


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="max_graphs must be at least 1, got 0"):
        GraphedCall(lambda inputs: inputs, torch.nn.Linear(1, 1), max_graphs=0)


class Plain(torch.nn.Module):
    """An encoder of [B, 2, 36, 24], which says that it reads its input and that all of its output was written."""

    def __init__(self, graphs, width):
        super().__init__()
        self.graphs, self.layer = graphs, torch.nn.Linear(24, width)

    def forward(self, x):
        self.graphs.read(x)
        y = self.layer(x)
        self.graphs.write(y)
        return y


def prepared(graphs=None):
    """Makes the inputs [B, 2, 36, 24] of two encoders from frames [B, 2, H, W, 3]."""

    def prepare(frames, dtype):
        if graphs is not None:
            graphs.read(frames)
        means = frames.to(dtype, copy=True).div(255).mean((2, 3)) if graphs is None else (frames / 255).mean((2, 3))
        inputs = [(means[:, :, None] * factor).repeat(1, 1, 36, 8) for factor in (1, 2)]
        for x in inputs if graphs is not None else []:
            graphs.write(x)
        return inputs

    return prepare


@pytest.fixture
def front_end(graphs, monkeypatch):
    def zeros(*shape, **kwargs):
        x = torch.full(shape, 0.0, **kwargs)
        graphs.write(x)
        return x

    monkeypatch.setattr(torch, "zeros", zeros)
    torch.manual_seed(0)
    encoders = torch.nn.ModuleDict({"a": Plain(graphs, 24), "b": Plain(graphs, 16)}).eval()
    projectors = [build_projector("3davg+linear", n, 32, 4, slots=2, grid=(6, 6)) for n in (24, 16)]
    tail = Tail(projectors, build_fusion("cross_attention_avg_lq", 2, 32, query_width=8)).eval()

    forward = tail.forward

    def written(xs):
        for x in xs:
            graphs.read(x)
        outputs = forward(xs)
        for y in outputs:
            graphs.write(y)
        return outputs

    tail.forward = written
    # Streams that are not those of the graphs, and are not to be used.
    return ConcurrentEncoders(encoders, streams=None), tail


def test_encoders_and_tail(graphs, front_end):
    encoders, tail = front_end
    made = FrontEndGraphs(prepared(graphs), encoders, tail, 2, graphs=graphs)
    assert made.obstacle is None
    # The small video's whole graph was only a trial.
    assert (graphs.captures, len(graphs.live)) == (3, 2)
    assert len(graphs.pools) == 1
    for _ in range(3):
        inputs = [torch.randn(1, 2, 36, 24) for _ in range(2)]
        for x in inputs:
            graphs.write(x)
        with torch.no_grad():
            features = made.encode(inputs)
            outputs = made.fuse(features)
            expected = [module(x) for module, x in zip(encoders.modules(), inputs, strict=True)]
            assert all(torch.equal(y, e) for y, e in zip(features, expected, strict=True))
            assert all(torch.equal(y, e) for y, e in zip(outputs, tail(expected), strict=True))
    assert graphs.captures == 3
    assert str(made).startswith(
        "from frames to tokens: 0 of at most 4 graphs; "
        "encode: 1 of at most 4 graphs; [1, 2, 36, 24] 0 MiB, 4 replays; fuse: 1 of at most 4"
    )


def frames_of(graphs, side, batch=1):
    frames = torch.randint(0, 256, (batch, 2, side, side, 3), dtype=torch.uint8)
    graphs.write(frames)
    return frames


def test_from_frames_to_tokens_in_one_graph(graphs, front_end):
    encoders, tail = front_end
    made = FrontEndGraphs(prepared(graphs), encoders, tail, 2, graphs=graphs)
    before = graphs.captures
    with torch.no_grad():
        for side, batch in ((8, 1), (12, 1), (8, 2)):
            # A shape that comes once is not worth a graph.
            assert made.replay(frames_of(graphs, side, batch)) is None
        assert graphs.captures == before
        for side, batch in ((8, 1), (12, 1), (8, 2), (8, 1)):
            frames = frames_of(graphs, side, batch)
            outputs = made.replay(frames)
            for y in outputs:
                graphs.read(y)
            inputs = prepared(graphs)(frames, torch.float32)
            expected = tail([module(x) for module, x in zip(encoders.modules(), inputs, strict=True)])
            assert all(torch.equal(y, e) for y, e in zip(outputs, expected, strict=True))
    assert graphs.captures == before + 3
    assert [bucket.replays for bucket in made.whole.buckets] == [1, 1, 2]
    # On the streams of the graphs: the inputs come from the one, the encoders run on the others.
    assert ("cpu/-1", "cuda:0/0") in graphs.waits


@pytest.mark.parametrize(
    ("whose", "words"),
    # An encoder that does not wait for its frames; the tail, which does not wait for an encoder.
    [("waiting", "cuda:0/1 does not wait for cpu/-1"), ("awaited", "cpu/-1 does not wait for cuda:0/1")],
)
def test_the_checker_sees_what_does_not_wait_in_one_graph(graphs, front_end, monkeypatch, whose, words):
    encoders, tail = front_end
    made, wait = FrontEndGraphs(prepared(graphs), encoders, tail, 2, graphs=graphs), graphs.wait

    def forgetful(waiting, awaited):
        if {"waiting": waiting, "awaited": awaited}[whose] != "cuda:0/1":
            wait(waiting, awaited)

    monkeypatch.setattr(graphs, "wait", forgetful)
    with torch.no_grad():
        made.replay(frames_of(graphs, 8))
        with pytest.raises(AssertionError, match=words):
            made.replay(frames_of(graphs, 8))


def test_of_old_shapes_of_frames_nothing_is_remembered(graphs, front_end, monkeypatch):
    encoders, tail = front_end
    monkeypatch.setattr(merv_fast.runtime.graphs, "REFUSALS", 2)
    made = FrontEndGraphs(prepared(graphs), encoders, tail, 2, graphs=graphs)
    with torch.no_grad():
        for side, known in ((4, False), (5, False), (4, True), (6, False), (4, True), (5, False), (6, False)):
            assert (made.replay(frames_of(graphs, side)) is not None) == known


def test_frames_that_cannot_be_prepared_in_a_capture(graphs, front_end):
    encoders, tail = front_end
    prepare = prepared(graphs)

    def fails(frames, dtype):
        if graphs.in_capture:
            raise RuntimeError("no")
        return prepare(frames, dtype)

    made = FrontEndGraphs(fails, encoders, tail, 2, graphs=graphs)
    assert made.whole.obstacle == made.obstacle == "capture failed: RuntimeError: no"
    assert made.encode.obstacle is made.fuse.obstacle is None
    with torch.no_grad():
        assert [made.replay(frames_of(graphs, 8)) for _ in range(3)] == [None] * 3


def test_encoders_are_measured_once_for_captures(graphs, front_end, monkeypatch):
    encoders, tail = front_end
    measured = []

    def measure(self, inputs):
        measured.append([x.shape for x in inputs])
        return [1.0, 3.0]

    monkeypatch.setattr(ConcurrentEncoders, "measure", measure)
    plans = []
    plan = ConcurrentEncoders.plan
    monkeypatch.setattr(
        ConcurrentEncoders, "plan", lambda self, devices: plans.append(plan(self, devices)) or plans[-1]
    )
    for _ in range(2):
        FrontEndGraphs(prepared(graphs), encoders, tail, 2, graphs=graphs)
    assert measured == [[(1, 2, 36, 24)] * 2]
    assert encoders.costs == [1.0, 3.0]
    # The second encoder takes longest and goes first.
    assert plans
    assert all([members for _, _, members in plan] == [[1], [0]] for plan in plans)


def test_encoders_without_graphs_are_not_measured(front_end, monkeypatch):
    encoders, tail = front_end
    monkeypatch.setattr(ConcurrentEncoders, "measure", None)
    assert FrontEndGraphs(prepared(), encoders, tail, 2).obstacle == "weights are on cpu, which has no CUDA graphs"
    assert encoders.costs is None


def test_lanes_and_costs_hold_for_captures(graphs, front_end):
    encoders, tail = front_end
    encoders.lanes, encoders.costs = 1, [1.0, 2.0]
    FrontEndGraphs(prepared(graphs), encoders, tail, 2, graphs=graphs)
    assert {waiting for waiting, _ in graphs.waits} == {"caller", "cpu/-1", "cuda:0/0"}


def write(tail):
    tail.fusion.Q.mul_(2)


def write_unseen(tail):
    # PyTorch counts no such write: `eval` says that there was one.
    tail.fusion.Q.data.mul_(2)
    tail.eval()


@pytest.mark.parametrize("change", [write, write_unseen])
def test_the_query_is_folded_once_and_again_when_it_was_written_to(graphs, front_end, monkeypatch, change):
    encoders, tail = front_end
    folded, fold = [], tail.fusion.fold
    monkeypatch.setattr(tail.fusion, "fold", lambda: folded.append(graphs.in_capture) or fold())
    # CUDA is told by the stream.
    monkeypatch.setattr(merv_fast.versions, "_capturing", lambda: graphs.in_capture)
    stream = [0]
    monkeypatch.setattr(merv_fast.versions, "_stream", lambda tensors: stream[0])
    made = FrontEndGraphs(prepared(graphs), encoders, tail, 2, graphs=graphs)
    assert folded == [False]
    features = [torch.randn(1, 2, 36, width) for width in (24, 16)]

    def right():
        for x in features:
            graphs.write(x)
        got = made.fuse(features)
        # On a stream of its own the plain call folds for itself.
        stream[0] = 1
        expected = tail(features)
        stream[0] = 0
        return all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))

    with torch.no_grad():
        assert right()
        captures = graphs.captures
        assert right()
        assert graphs.captures == captures
        change(tail)
        assert right()
        assert graphs.captures == captures + 1
        assert right()
        assert graphs.captures == captures + 1
    assert not any(folded)


def test_a_trial_that_fails_leaves_all_of_it_plain(graphs, front_end):
    encoders, tail = front_end

    def fail(xs):
        if graphs.in_capture:
            raise RuntimeError("no")
        return tail.fusion([projector(x) for projector, x in zip(tail.projectors, xs, strict=True)])

    tail.forward = fail
    made = FrontEndGraphs(prepared(graphs), encoders, tail, 2, graphs=graphs)
    assert made.encode.obstacle is None
    assert made.fuse.obstacle == made.obstacle == "capture failed: RuntimeError: no"


def test_encoders_that_cannot_be_captured_leave_the_tail_in_a_graph(graphs, front_end):
    encoders, tail = front_end
    first, layer = encoders.encoders["a"], encoders.encoders["a"].layer

    def fail(x):
        if graphs.in_capture:
            raise RuntimeError("no")
        y = layer(x)
        graphs.write(y)
        return y

    first.forward = fail
    made = FrontEndGraphs(
        prepared(graphs), ConcurrentEncoders(encoders.encoders, streams=graphs), tail, 2, graphs=graphs
    )
    assert made.encode.obstacle == made.obstacle == "capture failed: RuntimeError: no"
    assert (made.fuse.obstacle, len(made.fuse.buckets)) == (None, 1)


def test_encoders_that_no_module_holds(graphs, front_end):
    encoders, tail = front_end
    loose = ConcurrentEncoders(encoders.modules(), streams=graphs)
    assert FrontEndGraphs(prepared(graphs), loose, tail, 2, graphs=graphs).obstacle is None


def test_a_copy_has_no_graphs(graphs, front_end):
    encoders, tail = front_end
    assert copy.deepcopy([FrontEndGraphs(prepared(graphs), encoders, tail, 2, graphs=graphs)]) == [None]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
WIDTHS = (512, 1024, 2048)


class Encoder(torch.nn.Module):
    """Some layers, and what a capture does not allow, if asked to."""

    def __init__(self, width):
        super().__init__()
        self.layers = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(8)])
        self.waits = False

    def forward(self, x):
        if self.waits:
            x.sum().item()
        return self.layers(x)


@pytest.fixture
def on_gpu():
    torch.manual_seed(0)
    modules = torch.nn.ModuleList(Encoder(n) for n in WIDTHS).cuda().bfloat16().eval()
    return modules, GraphedCall(ConcurrentEncoders(modules, streams=CUDA_GRAPHS), modules)


def on_gpu_inputs(rows=256):
    return [torch.randn(rows, n, device="cuda").bfloat16() for n in WIDTHS]


def same(outputs, expected):
    pairs = zip(tree_leaves(outputs), tree_leaves(expected), strict=True)
    return all(torch.equal(y, e) for y, e in pairs)


@needs_gpu
def test_two_hundred_replays_are_the_serial_results(on_gpu):
    modules, call = on_gpu
    with torch.inference_mode():
        for turn in range(200):
            inputs = on_gpu_inputs(rows=(256, 64)[turn % 2])
            outputs = call(inputs)
            # Memory of the inputs may be had by others at once.
            expected = [module(x) for module, x in zip(modules, inputs, strict=True)]
            assert same(outputs, expected)
            del inputs, outputs
    assert [bucket.replays for bucket in call.buckets] == [100, 100]
    assert call.pool.bytes > 0


@needs_gpu
def test_outputs_are_the_callers_on_a_gpu(on_gpu):
    _, call = on_gpu
    with torch.inference_mode():
        first = call(on_gpu_inputs())
        kept = [y.clone() for y in first]
        for _ in range(5):
            call(on_gpu_inputs())
    assert same(first, kept)


@needs_gpu
def test_graphs_come_and_go(on_gpu):
    modules, call = on_gpu
    call.max_graphs = 2
    with torch.inference_mode():
        for rows in (16, 32, 48, 16, 64, 32):
            inputs = on_gpu_inputs(rows)
            assert same(call(inputs), [module(x) for module, x in zip(modules, inputs, strict=True)])
        assert len(call.buckets) == 2
        call.clear()
        inputs = on_gpu_inputs(16)
        assert same(call(inputs), [module(x) for module, x in zip(modules, inputs, strict=True)])


@needs_gpu
def test_weights_on_a_gpu(on_gpu):
    modules, call = on_gpu
    inputs = on_gpu_inputs()
    with torch.inference_mode():
        call(inputs)
    with torch.no_grad():
        for weight in modules.parameters():
            weight.mul_(1.5)
        assert same(call(inputs), [module(x) for module, x in zip(modules, inputs, strict=True)])
        assert len(call.buckets) == 1
        assert call.buckets[0].replays == 2
        modules.float().bfloat16()
        assert same(call(inputs), [module(x) for module, x in zip(modules, inputs, strict=True)])
        assert call.buckets[0].replays == 1


@needs_gpu
def test_a_failed_capture_leaves_everything_usable(on_gpu, caplog):
    modules, call = on_gpu
    stream = torch.cuda.current_stream()
    with torch.inference_mode(), caplog.at_level(logging.WARNING, "merv_fast"):
        inputs = on_gpu_inputs()
        expected = [module(x) for module, x in zip(modules, inputs, strict=True)]
        assert same(call(inputs), expected)
        modules[1].waits = True
        few = on_gpu_inputs(32)
        assert same(call(few), [module(x) for module, x in zip(modules, few, strict=True)])
        assert torch.cuda.current_stream() == stream
        assert next(iter(call.plain_calls)).startswith("capture failed")
        modules[1].waits = False
        assert same(call(inputs), expected)
        fewer = on_gpu_inputs(24)
        assert same(call(fewer), [module(x) for module, x in zip(modules, fewer, strict=True)])
        assert len(call.buckets) == 2


@needs_gpu
def test_eight_threads_on_a_gpu(on_gpu):
    modules, call = on_gpu
    wrong = []

    def run(number):
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(20):
                inputs = on_gpu_inputs(rows=16 * (1 + (number + turn) % 2))
                outputs = call(inputs)
                if not same(outputs, [module(x) for module, x in zip(modules, inputs, strict=True)]):
                    wrong.append((number, turn))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@needs_gpu
def test_the_tail_on_a_gpu_sees_weights_written_to():
    torch.manual_seed(0)
    encoders = torch.nn.ModuleList([torch.nn.Linear(24, 24), torch.nn.Linear(24, 16)]).cuda().bfloat16().eval()
    projectors = [build_projector("3davg+linear", n, 32, 4, slots=2, grid=(6, 6)) for n in (24, 16)]
    tail = Tail(projectors, build_fusion("cross_attention_avg_lq", 2, 32, query_width=8)).cuda().bfloat16().eval()
    made = FrontEndGraphs(prepared(), ConcurrentEncoders(encoders), tail, 2)
    assert made.obstacle is None
    with torch.no_grad():
        for _ in range(3):
            for weight in [*encoders.parameters(), *tail.parameters()]:
                weight.mul_(1.25)
            inputs = [torch.randn(1, 2, 36, 24, device="cuda").bfloat16() for _ in range(2)]
            expected = tail([module(x) for module, x in zip(encoders, inputs, strict=True)])
            assert same(made.fuse(made.encode(inputs)), expected)
        frames = torch.randint(0, 256, (1, 2, 9, 9, 3), dtype=torch.uint8, device="cuda")
        assert made.replay(frames) is None
        inputs = prepared()(frames, torch.bfloat16)
        expected = tail([module(x) for module, x in zip(encoders, inputs, strict=True)])
        assert same(made.replay(frames), expected)
    assert [len(call.buckets) for call in made.pool.calls] == [1, 1, 1]
