"""A model whose encoders and tail are in graphs, which are played."""

import copy
import gc
import logging
import threading
import weakref

import pytest
import torch

from merv_fast.models.identity import model_identity
from merv_fast.models.video_model import MervVideoModel
from merv_fast.runtime.cache import VideoCache
from merv_fast.runtime.front_end import FrontEndGraphs
from tests.models.test_merv_model import GREEDY, QUESTIONS, prompt
from tests.runtime.happens_before import RecordingGraphs


class PlayedGraphs(RecordingGraphs):
    """Without the order of reads and writes, which these modules do not tell."""

    def read(self, tensor):
        pass

    def write(self, tensor):
        pass


@pytest.fixture
def video_model(tiny):
    model = tiny.model.video_model
    yield model
    model.encode_budget, model.graphs, model.concurrent.costs = None, None, None


@pytest.fixture
def graphs(video_model, monkeypatch):
    """Turns graphs on, which are played."""
    played = PlayedGraphs()
    made = FrontEndGraphs.__init__
    monkeypatch.setattr(
        FrontEndGraphs, "__init__", lambda self, *args, **kwargs: made(self, *args, **kwargs, graphs=played)
    )
    video_model.use_graphs()
    return played


def inputs_of(model, batch):
    configs = model.encoder_configs.values()
    return [torch.randn(batch, c.num_frames, 3, c.recipe.size, c.recipe.size) for c in configs]


def test_off_unless_asked_for(video_model):
    assert video_model.graphs is None
    video_model.use_graphs()
    assert video_model.graphs.obstacle == "weights are on cpu, which has no CUDA graphs"
    with torch.inference_mode():
        video_model.fuse(video_model.encode(inputs_of(video_model, 1)))
    video_model.use_graphs(None)
    assert video_model.graphs is None
    with pytest.raises(ValueError, match="max_graphs must be at least 1, got 0"):
        video_model.use_graphs(0)


def test_encode_and_fuse_are_replayed(video_model, graphs):
    # One video was captured at once, and all of it in one.
    assert (graphs.captures, graphs.replays) == (3, 1)
    for batch in (1, 3, 1):
        inputs = inputs_of(video_model, batch)
        with torch.inference_mode():
            features = video_model.encode(inputs)
            output = video_model.fuse(features)
            expected = video_model.concurrent(inputs)
            tokens, weights = video_model.tail(expected)
        assert all(torch.equal(y, e) for y, e in zip(features, expected, strict=True))
        assert torch.equal(output.pooler_output, tokens)
        assert torch.equal(output.encoder_weights, weights)
    assert (graphs.captures, graphs.replays) == (5, 7)


def frames_of(model, batch, side=20):
    count = max(config.num_frames for config in model.encoder_configs.values())
    return torch.randint(0, 256, (batch, count, 3, side, side + 4), dtype=torch.uint8)


def test_from_frames_to_tokens_in_one_replay(video_model, graphs):
    with torch.inference_mode():
        for batch, side in ((1, 20), (2, 20), (1, 24), (1, 20), (2, 20), (1, 24), (1, 20)):
            frames = frames_of(video_model, batch, side)
            output = video_model.get_video_features(frames)
            expected = video_model.tail(video_model.concurrent(video_model.prepare(frames)))
            assert torch.equal(output.pooler_output, expected[0])
            assert torch.equal(output.encoder_weights, expected[1])
    assert [(bucket.shapes[0][:1], bucket.replays) for bucket in video_model.graphs.whole.buckets] == [
        ([2], 1),
        ([1], 1),
        ([1], 2),
    ]


def never(frames):
    raise AssertionError("a graph was asked for")


@pytest.mark.parametrize("reason", ["gradients", "budget", "floating point", "several sizes"])
def test_what_is_not_replayed_as_a_whole(video_model, graphs, monkeypatch, reason):
    monkeypatch.setattr(video_model.graphs, "replay", never)
    frames = frames_of(video_model, 2)
    if reason == "budget":
        video_model.encode_budget = video_model.bytes_per_video()
    elif reason == "floating point":
        frames = frames / 255
    elif reason == "several sizes":
        frames = [frames[0], frames_of(video_model, 1, 12)[0]]
    with torch.set_grad_enabled(reason == "gradients"):
        output = video_model.get_video_features(frames)
        assert torch.equal(output[0], video_model.tail(video_model.concurrent(video_model.prepare(frames)))[0])
        assert reason == "several sizes" or video_model.replay(frames) is None


def test_answers_by_one_graph(tiny, clips, video_model, graphs):
    asked = [tiny.answer(clips[0], prompt(tiny, QUESTIONS[0]), **GREEDY)[0] for _ in range(3)]
    assert [bucket.replays for bucket in video_model.graphs.whole.buckets] == [2]
    # What one graph does is one stage.
    assert [answer.timings_ms["prepare"] > 0 for answer in asked] == [True, False, False]
    assert [answer.timings_ms["encode"] > 0 for answer in asked] == [True] * 3
    assert len({answer.answer for answer in asked}) == 1
    weights = [answer.encoder_weights for answer in asked]
    assert weights[0] == weights[1] == weights[2]
    # No video, and several, go step by step.
    before = graphs.replays
    tiny.generate([None, clips[0], clips[1]], prompt(tiny, QUESTIONS[0]), **GREEDY)
    assert [bucket.replays for bucket in video_model.graphs.whole.buckets] == [2]
    tiny.generate(None, prompt(tiny, QUESTIONS[0]), **GREEDY)
    assert graphs.replays == before + 4


def test_without_memory_for_a_graph_the_batch_is_halved(video_model, graphs, caplog):
    tail, concurrent = video_model.tail, video_model.graphs.whole.call

    def full(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    video_model.graphs.whole.call = full
    frames = frames_of(video_model, 4)
    with torch.inference_mode(), caplog.at_level(logging.WARNING, "merv_fast"):
        for _ in range(2):
            output = video_model.get_video_features(frames)
            assert torch.equal(output[0], tail(video_model.concurrent(video_model.prepare(frames)))[0])
    assert caplog.messages == ["out of memory for a CUDA graph of 4 videos, going on without (CUDA out of memory)"]
    video_model.graphs.whole.call = concurrent
    with torch.inference_mode():
        video_model.get_video_features(frames)
    assert len(video_model.graphs.whole.buckets) == 1


def test_what_is_told_is_of_the_model_as_it_is(video_model, graphs):
    with torch.inference_mode():
        for _ in range(2):
            video_model.get_video_features(frames_of(video_model, 1))
        hook = video_model.tail.register_forward_hook(lambda *_: None)
        video_model.get_video_features(frames_of(video_model, 1))
        assert "hooks" in video_model.graphs.obstacle
        hook.remove()
    assert video_model.graphs.obstacle is None
    assert "no graphs" not in str(video_model.graphs)


def test_encoders_that_are_compiled_are_captured_anew(video_model, graphs):
    with torch.inference_mode():
        for _ in range(2):
            video_model.get_video_features(frames_of(video_model, 1))
    assert video_model.graphs.whole.buckets
    video_model.use_compile({"dinov2"}, backend="eager")
    try:
        assert [call.buckets for call in video_model.graphs.pool.calls] == [[], [], []]
    finally:
        video_model.use_compile(False)


def test_nothing_holds_a_model_that_is_gone(video_model, graphs):
    other = copy.deepcopy(video_model)
    other.use_graphs()
    gone = weakref.ref(other)
    gc.collect()
    gc.disable()
    try:
        del other
        assert gone() is None
    finally:
        gc.enable()


def test_parts_of_a_batch_are_shapes(video_model, graphs):
    video_model.encode_budget = int(2.9 * video_model.bytes_per_video())
    with torch.inference_mode():
        video_model.encode(inputs_of(video_model, 3))
    assert [bucket.shapes[0][0] for bucket in video_model.graphs.encode.buckets] == [2, 1]


def test_with_gradients_nothing_is_replayed(video_model, graphs):
    before = graphs.replays
    assert video_model.fuse(video_model.encode(inputs_of(video_model, 1))).pooler_output.requires_grad
    assert graphs.replays == before


def test_the_same_answers_under_the_same_key(tiny, clips, video_model, graphs):
    cache = VideoCache()
    replayed, key = tiny.generate(clips[0], prompt(tiny, QUESTIONS[0]), **GREEDY), model_identity(video_model, cache)
    assert graphs.replays > 1
    video_model.use_graphs(None)
    assert graphs.live == []
    assert tiny.generate(clips[0], prompt(tiny, QUESTIONS[0]), **GREEDY) == replayed
    assert model_identity(video_model, cache) == key


def test_a_copy_of_the_model_has_none(video_model, graphs):
    other = copy.deepcopy(video_model)
    assert isinstance(other, MervVideoModel)
    assert other.graphs is None


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_gpu
def test_eight_threads_ask_on_a_gpu(tiny):
    vidlm = copy.deepcopy(tiny).to("cuda", torch.bfloat16)
    frames = [frames_of(vidlm.model.video_model, 1, side)[0].movedim(1, -1) for side in (20, 28, 36, 44, 52, 60)]
    asked = prompt(vidlm, QUESTIONS[0])
    expected = [vidlm.generate(x, asked, **GREEDY) for x in frames]
    vidlm.model.video_model.use_graphs()
    wrong = []

    def run(number):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(12):
                    which = (number + turn) % len(frames)
                    if vidlm.generate(frames[which], asked, **GREEDY) != expected[which]:
                        wrong.append((number, turn))
        except Exception as error:  # which a thread would keep to itself
            wrong.append((number, error))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(vidlm.model.video_model.graphs.whole.buckets) == 4


@needs_gpu
def test_replays_on_a_gpu_are_the_plain_results(video_model):
    model = copy.deepcopy(video_model).to("cuda", torch.bfloat16)
    model.use_graphs()
    assert model.graphs.obstacle is None
    with torch.inference_mode():
        for turn in range(200):
            inputs = [x.to("cuda", torch.bfloat16) for x in inputs_of(model, 1 + turn % 3)]
            features = model.encode(inputs)
            output = model.fuse(features)
            expected = [encoder(x) for encoder, x in zip(model.encoders.values(), inputs, strict=True)]
            tokens, weights = model.tail(expected)
            assert all(torch.equal(y, e) for y, e in zip(features, expected, strict=True))
            assert torch.equal(output.pooler_output, tokens)
            assert torch.equal(output.encoder_weights, weights)
            frames = frames_of(model, 1 + turn % 2, side=(90, 240)[turn % 3 == 0]).cuda()
            output = model.get_video_features(frames)
            inputs = model.prepare(frames)
            expected = [encoder(x) for encoder, x in zip(model.encoders.values(), inputs, strict=True)]
            assert torch.equal(output.pooler_output, model.tail(expected)[0])
    assert model.graphs.whole.plain_calls == {}
    assert sum(bucket.replays for bucket in model.graphs.whole.buckets) == 196
    assert [len(call.buckets) for call in model.graphs.pool.calls] == [3, 3, 4]
    assert not model.graphs.encode.plain_calls
