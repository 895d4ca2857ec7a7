"""Streams of text, stop strings and the static cache, through MervModel's lists and shared prefixes."""

from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, TextIteratorStreamer, TextStreamer

import merv_fast
from merv_fast.models.prefix import sharing_obstacle
from merv_fast.runtime.cache import VideoCache
from tests.models.test_merv_model import GREEDY, QUESTIONS, prompt
from tests.models.test_prefix import unshared

SPLICED = 257
"""Positions of merv-tiny's BOS and visual tokens."""


@pytest.fixture
def prompts(tiny):
    return [prompt(tiny, question) for question in QUESTIONS]


@pytest.fixture
def prefills(tiny):
    """(rows, positions) of each pass of the language model over more than one position."""
    passes = []
    handle = tiny.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    yield passes
    handle.remove()


class Pieces(TextStreamer):
    """Keeps what it is given, and how many passes the language model had made by then."""

    def __init__(self, vidlm, passes):
        super().__init__(vidlm.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.passes, self.pieces, self.ends = passes, [], 0

    def on_finalized_text(self, text, stream_end=False):
        self.pieces.append((len(self.passes), text))
        self.ends += stream_end

    @property
    def text(self):
        return "".join(text for _, text in self.pieces)


@pytest.mark.parametrize("way", ["path", "encoded", "prefilled", "windows"])
def test_text_streams_while_it_is_made(tiny, clips, prompts, prefills, way):
    windows = 2 if way == "windows" else 1
    video = clips[2] if way in ("path", "windows") else tiny.encode(clips[2], prefill=way == "prefilled")
    expected = tiny.generate(video, prompts[1], windows=windows, **GREEDY)
    prefills.clear()
    streamer = Pieces(tiny, prefills)
    assert tiny.generate(video, prompts[1], windows=windows, streamer=streamer, **GREEDY) == expected
    assert streamer.text.strip() == expected
    assert streamer.ends == 1
    # A piece a token at most, each before the passes that make the ones after it.
    assert sorted({at for at, _ in streamer.pieces}) == list(range(1, 13))
    assert (prefills[0][1] < SPLICED) == (way == "prefilled")


def test_an_iterator_in_a_thread(tiny, clips, prompts):
    expected = tiny.generate(clips[2], prompts[0], **GREEDY)
    streamer = TextIteratorStreamer(tiny.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = Thread(target=tiny.generate, args=(clips[2], prompts[0]), kwargs={"streamer": streamer, **GREEDY})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces).strip() == expected
    assert len(list(filter(None, pieces))) > 2


def test_a_stream_is_of_one_prompt(tiny, clips, prompts, monkeypatch):
    monkeypatch.setattr(tiny.model.video_model, "encode", lambda inputs: pytest.fail("encoded"))
    for videos, asked, count in ((clips[0], prompts, 3), (clips[:2], prompts[0], 2), ([], [], 0)):
        streamer = Pieces(tiny, [])
        with pytest.raises(
            ValueError, match=f"generate: streamer must be left out unless there is one prompt, got {count}"
        ):
            tiny.generate(videos, asked, streamer=streamer, **GREEDY)
        assert streamer.ends == 1


def test_a_list_of_one_may_stream(tiny, clips, prompts):
    streamer = Pieces(tiny, [])
    (text,) = tiny.generate([clips[2]], [prompts[0]], streamer=streamer, **GREEDY)
    assert streamer.text.strip() == text


def test_a_reader_does_not_wait_for_what_will_not_come(tiny, tmp_path):
    """transformers ends a stream after the answer only."""
    (tmp_path / "empty.mp4").touch()
    streamer = TextIteratorStreamer(tiny.tokenizer, skip_prompt=True, timeout=60)
    with pytest.raises(merv_fast.VideoError, match="is an empty file"):
        tiny.generate(tmp_path / "empty.mp4", "In: a\nOut:", streamer=streamer)
    assert list(streamer) == [""]


STOP = [["a>"], ["Wh"], [" a", "f"]]


@pytest.mark.parametrize("stop", STOP)
def test_stop_strings_end_each_answer_of_a_list(tiny, clips, prompts, stop, monkeypatch):
    """As transformers does alone with each prompt: the answer includes the string that ends it."""
    stopped = 0
    alone = []
    for clip, text in zip(clips, prompts, strict=True):
        inputs = tiny.processor(text=text, videos=str(clip))
        ids = tiny.model.generate(**inputs, stop_strings=stop, tokenizer=tiny.tokenizer, **GREEDY)
        new = ids[0, inputs["input_ids"].shape[1] :]
        alone.append(tiny.tokenizer.decode(new, skip_special_tokens=True).strip())
        stopped += len(new) < 12
    assert stopped
    assert tiny.generate(clips, prompts, stop_strings=stop, **GREEDY) == alone
    whole = tiny.generate(clips, prompts, **GREEDY)
    for text, full in zip(alone, whole, strict=True):
        assert text == full or any(text.endswith(each.strip()) for each in stop)
    # The three questions about one video, with the prefix shared and not.
    assert sharing_obstacle(tiny.model, {"stop_strings": stop}) is None
    expected = unshared(tiny, clips[2], prompts, monkeypatch=monkeypatch, stop_strings=stop, **GREEDY)
    assert tiny.generate(clips[2], prompts, stop_strings=stop, **GREEDY) == expected
    assert expected == [tiny.generate(clips[2], text, stop_strings=stop, **GREEDY) for text in prompts]


def test_stop_strings_of_a_generation_config(tiny, clips, prompts, monkeypatch):
    expected = tiny.generate(clips[2], prompts, stop_strings=["a>"], **GREEDY)
    assert expected != tiny.generate(clips[2], prompts, **GREEDY)
    config = GenerationConfig(stop_strings=["a>"], pad_token_id=0, eos_token_id=2, **GREEDY)
    assert tiny.generate(clips[2], prompts, generation_config=config) == expected
    monkeypatch.setattr(tiny.model.generation_config, "stop_strings", ["a>"])
    assert tiny.generate(clips[2], prompts, **GREEDY) == expected


def test_a_static_cache_answers_the_same(tiny, clips, prompts, prefills):
    assert sharing_obstacle(tiny.model, {"cache_implementation": "static"}) == "cache_implementation is 'static'"
    static = {"cache_implementation": "static", **GREEDY}
    visual = tiny.encode(clips[2], prefill=True)
    calls = [
        (clips[2], prompts[0], {}),
        (clips, prompts, {}),
        (clips[2], prompts, {}),
        (visual, prompts, {}),
        (clips[2], prompts[1], {"windows": 3}),
    ]
    for video, text, more in calls:
        expected = tiny.generate(video, text, **more, **GREEDY)
        prefills.clear()
        assert tiny.generate(video, text, **more, **static) == expected
        # Every row from its start, with all its visual tokens.
        assert [rows for rows, length in prefills if length > SPLICED] == [3 if isinstance(text, list) else 1]


def test_decoding_in_a_static_cache_compiles_to_one_graph(tiny, clips, prompts):
    """As transformers does by itself on a GPU."""
    graphs = []

    def backend(module, example_inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = CompileConfig(backend=backend, mode=None, fullgraph=True)
    compiled._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": compiled, **GREEDY}
    visual = tiny.encode(clips[2])
    for asked, count in ((prompts[:1], 1), (prompts[:1], 1), (prompts, 2)):
        assert tiny.generate(visual, asked, **static) == tiny.generate(visual, asked, **GREEDY)
        # All steps of a batch of one size.
        assert len(graphs) == count


def test_ragged_windows_in_a_static_cache(tiny, clips, prompts):
    visuals = [tiny.encode(clip, windows=n) for clip, n in zip(clips, (2, 1, 3), strict=True)]
    expected = tiny.generate(visuals, prompts, **GREEDY)
    assert tiny.generate(visuals, prompts, cache_implementation="static", **GREEDY) == expected


def test_an_empty_prompt_is_answered_as_ever(tiny, clips):
    """Nothing of it is left once the visual tokens are shared."""
    expected = tiny.generate(clips[0], "", **GREEDY)
    assert tiny.generate(clips[0], ["", ""], **GREEDY) == [expected] * 2


@pytest.mark.parametrize("cached", [True, False])
def test_eight_threads_with_windows_and_streams(tiny, clips, prompts, cached):
    """Every answer, stream and encoding is that of one call at a time, and no window is encoded twice."""
    jobs = [(clip, text, n) for clip in clips[1:] for text in prompts[:2] for n in (1, 2)]
    expected = {job: tiny.answer(job[0], job[1], windows=job[2], **GREEDY)[0] for job in jobs}
    stopped = {clip: tiny.generate(clip, prompts, windows=2, stop_strings=["a>"], **GREEDY) for clip in clips}
    tokens = {(clip, n): tiny.encode(clip, windows=n).tokens for clip in clips[1:] for n in (1, 2)}
    tiny.cache = VideoCache() if cached else None

    def call(index):
        clip, text, n = job = jobs[index % len(jobs)]
        match index % 5:
            case 0:
                return torch.equal(tiny.encode(clip, windows=n).tokens, tokens[clip, n])
            case 1:
                return tiny.generate(clip, prompts, windows=2, stop_strings=["a>"], **GREEDY) == stopped[clip]
            case 2:
                (answer,) = tiny.answer(clip, text, windows=n, cache_implementation="static", **GREEDY)
                return (answer.answer, answer.windows) == (expected[job].answer, expected[job].windows)
        streamer = Pieces(tiny, [])
        (answer,) = tiny.answer(clip, text, windows=n, streamer=streamer, **GREEDY)
        same = (answer.answer, answer.windows) == (expected[job].answer, expected[job].windows)
        return same and streamer.text.strip() == answer.answer and streamer.ends == 1

    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(call, range(24)))
        # Of each of two videos the whole and two halves.
        assert not cached or tiny.cache.counts.misses == 2 * (1 + 2)
    finally:
        tiny.cache = None
