"""Long videos: each window is encoded as a video of its own, and the language model sees all of them in order."""

import math
import shutil
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import merv_fast
from merv_fast.models import windows as windows_module
from merv_fast.models.windows import window_bounds
from merv_fast.runtime.cache import VideoCache
from merv_fast.runtime.cache.video_cache import CacheCounts
from merv_fast.video import load_frames, sample_indices
from tests.models.conftest import write_clip
from tests.models.random_merv import build_tiny
from tests.models.test_merv_model import GREEDY, QUESTIONS, prompt


@pytest.fixture
def prompts(tiny):
    return [prompt(tiny, question) for question in QUESTIONS]


@pytest.fixture
def vidlm(tiny):
    """merv-tiny with a cache."""
    tiny.cache = VideoCache()
    yield tiny
    tiny.cache = None


@pytest.fixture
def room(tiny, monkeypatch):
    """Sets the positions of the language model."""
    return lambda positions: monkeypatch.setattr(
        tiny.model.config.get_text_config(), "max_position_embeddings", positions
    )


def parts(vidlm, clip, visual):
    """What a call for the bounds of each window gives."""
    return [vidlm.encode(clip, clip_start_sec=w.start, clip_end_sec=w.end) for w in visual.windows]


@pytest.mark.parametrize(
    ("windows", "clip"),
    [
        (2, {}),
        (3, {}),
        (3, {"clip_start_sec": 0.35, "clip_end_sec": 1.7}),
        (2, {"clip_end_sec": 99.0}),
        (2, {"clip_start_sec": float("nan"), "clip_end_sec": 1}),
    ],
)
def test_windows_are_calls_for_their_bounds_joined(tiny, clips, room, windows, clip):
    room(10_000)
    for path in clips:
        visual = tiny.encode(path, windows=windows, **clip)
        each = parts(tiny, path, visual)
        assert len(each) == windows
        assert torch.equal(visual.tokens, torch.cat([part.tokens for part in each]))
        assert [w.encoder_weights for w in visual.windows] == [part.encoder_weights for part in each]
        for name, weight in visual.encoder_weights.items():
            assert weight == pytest.approx(sum(part.encoder_weights[name] for part in each) / windows)
    assert not torch.equal(each[0].tokens, each[1].tokens)


def test_as_many_windows_as_frames(tiny, clips, room):
    room(10_000)
    visual = tiny.encode(clips[2], windows=20)
    frames = load_frames(clips[2], 20)
    each = [tiny.encode(frame.expand(32, -1, -1, -1).contiguous()) for frame in frames]
    assert torch.equal(visual.tokens, torch.cat([part.tokens for part in each]))


def test_one_window_is_the_plain_call(tiny, clips, prompts):
    for path in clips:
        plain, one = tiny.encode(path), tiny.encode(path, windows=1)
        assert torch.equal(one.tokens, plain.tokens)
        assert one.encoder_weights == plain.encoder_weights
        assert one.windows == ()
    assert tiny.generate(clips, prompts, windows=1, **GREEDY) == tiny.generate(clips, prompts, **GREEDY)


def test_a_gif_and_a_folder_have_windows_too(tiny, clips, tmp_path):
    import av

    with av.open(str(clips[2])) as file, av.open(str(tmp_path / "clip.gif"), "w") as gif:
        stream = gif.add_stream("gif", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "rgb8"
        for index, frame in enumerate(file.decode(video=0)):
            gif.mux(stream.encode(frame.reformat(format="rgb8")))
            (tmp_path / "frames").mkdir(exist_ok=True)
            with av.open(str(tmp_path / f"frames/{index}.png"), "w", format="image2", options={"update": "1"}) as png:
                picture = png.add_stream("png")
                picture.width, picture.height, picture.pix_fmt = 64, 64, "rgb24"
                png.mux(picture.encode(frame.reformat(format="rgb24")))
        gif.mux(stream.encode())
    for path, fps, end in ((tmp_path / "clip.gif", None, 2.0), (tmp_path / "frames", 4.0, 5.0)):
        visual = tiny.encode(path, windows=2, fps=fps)
        assert [(w.start, w.end) for w in visual.windows] == [(0, pytest.approx(end / 2)), (visual.windows[0].end, end)]
        each = [tiny.encode(path, fps=fps, clip_start_sec=w.start, clip_end_sec=w.end) for w in visual.windows]
        assert torch.equal(visual.tokens, torch.cat([part.tokens for part in each]))


class Length:
    """As much of a video as `window_bounds` looks at."""

    path = "clip.mp4"

    def __init__(self, frames, fps):
        self.frames, self.fps = frames, fps

    def __len__(self):
        return self.frames


@settings(deadline=None, max_examples=400)
@given(
    frames=st.integers(1, 200_000),
    fps=st.sampled_from([3.0, 10.0, 25.0, 24000 / 1001, 30000 / 1001, 1 / 3]) | st.floats(0.05, 240),
    windows=st.integers(1, 40) | st.integers(1, 3000),
    start=st.just(0.0) | st.floats(0, 1),
    end=st.none() | st.floats(0, 1.5),
)
@example(frames=40, fps=30000 / 1001, windows=40, start=0.0, end=None)
@example(frames=7, fps=10.0, windows=3, start=0.3, end=1.0)
@example(frames=3, fps=25.0, windows=4, start=0.0, end=None)
def test_windows_hold_every_frame_of_the_clip_once(frames, fps, windows, start, end):
    video, length = Length(frames, fps), frames / fps
    start, end = start * length, None if end is None else end * length
    if start >= length or (end is not None and end <= start):
        return  # refused before: the clip lies outside the video
    last = math.floor(frames - 1 if end is None else min(frames - 1, end * fps - 1))
    held = last + 1 - math.floor(start * fps)
    if held < windows:
        with pytest.raises(merv_fast.VideoError, match=f"must have a frame for each of {windows} windows"):
            window_bounds(video, windows, start, end)
        return
    bounds = window_bounds(video, windows, start, end)
    assert len(bounds) == windows
    assert bounds[0][0] == start
    assert bounds[-1][1] == (pytest.approx(length) if end is None or end > length else end)
    assert all(before[1] == after[0] for before, after in pairwise(bounds))
    spans = [sample_indices(frames, fps, 2, *each) for each in bounds]
    assert (spans[0][0], spans[-1][1]) == (math.floor(start * fps), last)
    assert all(before[1] + 1 == after[0] for before, after in pairwise(spans))
    sizes = {last - first + 1 for first, last in spans}
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


def test_one_window_at_a_time_is_in_memory(tiny, tmp_path, monkeypatch):
    """However many there are: the frames and inputs of one are gone before the next is decoded."""
    path = write_clip(tmp_path / "long.mp4", frames=120, size=(64, 64))
    alive, most, sizes = [], [], []
    read = merv_fast.video.pyav.PyAVVideo.frames_at
    prepare, encode = tiny.model.video_model.prepare, tiny.model.video_model.encode

    def noted(tensors):
        alive.extend(weakref.ref(tensor) for tensor in tensors)
        return tensors

    def read_noted(video, indices):
        most.append(sum(reference() is not None for reference in alive))
        sizes.append(len(indices))
        return noted([read(video, indices)])[0]

    def encode_noted(inputs):
        sizes.append(len(inputs[0]))
        return noted(encode(inputs))

    monkeypatch.setattr(merv_fast.video.pyav.PyAVVideo, "frames_at", read_noted)
    monkeypatch.setattr(tiny.model.video_model, "prepare", lambda frames: noted(prepare(frames)))
    monkeypatch.setattr(tiny.model.video_model, "encode", encode_noted)
    tiny.encode(path, windows=12)
    assert most == [0] * 12
    assert sizes == [32, 1] * 12


def test_a_file_is_opened_once_and_again_when_it_changes(tiny, clips, tmp_path, monkeypatch):
    path = shutil.copy(clips[0], tmp_path / "clip.mp4")
    opened, open_video, encode = [], windows_module.open_video, tiny.model.video_model.encode
    monkeypatch.setattr(windows_module, "open_video", lambda *a, **k: opened.append(a) or open_video(*a, **k))
    tiny.encode(path, windows=4)
    assert len(opened) == 1

    def replace_then_encode(inputs):
        shutil.copy(clips[1], path)
        return encode(inputs)

    monkeypatch.setattr(tiny.model.video_model, "encode", replace_then_encode)
    opened.clear()
    tiny.cache = VideoCache()
    try:
        visual = tiny.encode(path, windows=2)
        monkeypatch.undo()
        assert len(opened) == 2
        # The first window's frames were of the file before, so nothing is kept of it.
        assert len(tiny.cache.memory) == 1
        tiny.cache, kept = None, tiny.cache
        second = visual.windows[1]
        bounds = {"clip_start_sec": second.start, "clip_end_sec": second.end}
        fresh = tiny.encode(clips[1], **bounds)
        tiny.cache = kept
        assert torch.equal(tiny.encode(clips[1], **bounds).tokens, fresh.tokens)
        assert kept.counts.hits == 1
    finally:
        tiny.cache = None


@pytest.mark.parametrize("keep", ["tokens", "features"])
def test_each_window_is_kept_as_the_clip_that_it_is(tiny, clips, keep):
    expected = tiny.encode(clips[0], windows=3)
    tiny.cache = VideoCache(keep=keep)
    try:
        for _ in range(2):
            visual = tiny.encode(clips[0], windows=3)
            assert torch.equal(visual.tokens, expected.tokens)
            assert visual.windows == expected.windows
        assert tiny.cache.counts == CacheCounts(hits=3, misses=3)
        parts(tiny, clips[0], visual)
        assert tiny.cache.counts == CacheCounts(hits=6, misses=3)
    finally:
        tiny.cache = None


def test_stages_keep_their_order(vidlm, clips, prompts):
    stages = ["cache", "decode", "prepare", "encode", "fuse", "generate"]
    (first,) = vidlm.answer(clips[0], prompts[0], windows=2, **GREEDY)
    (second,) = vidlm.answer(clips[0], prompts[0], windows=2, **GREEDY)
    assert list(first.timings_ms) == list(second.timings_ms) == stages
    assert all(first.timings_ms[stage] > 0 for stage in stages)
    assert [second.timings_ms[stage] for stage in ("prepare", "encode", "fuse")] == [0, 0, 0]
    assert (second.answer, second.windows) == (first.answer, first.windows)
    assert first.windows == vidlm.encode(clips[0], windows=2).windows


def test_the_language_model_sees_all_windows_in_order(tiny, clips, prompts):
    visual = tiny.encode(clips[2], windows=3)
    inputs = tiny.processor(["<|video_pad|>" + prompts[0]])
    ids = inputs["input_ids"][0].tolist()
    bos, text = ids[:1], ids[1 + 256 :]
    before = tiny.model.get_input_embeddings()(torch.tensor([bos]))
    after = tiny.model.get_input_embeddings()(torch.tensor([text]))
    embeds = torch.cat([before, *(part.tokens[None] for part in parts(tiny, clips[2], visual)), after], 1)
    with torch.inference_mode():
        new = tiny.model.language_model.generate(
            inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), pad_token_id=0, **GREEDY
        )
    expected = tiny.tokenizer.decode(new[0], skip_special_tokens=True).strip()
    (answer,) = tiny.answer(clips[2], prompts[0], windows=3, **GREEDY)
    assert answer.answer == expected
    assert answer.answer != tiny.generate(clips[2], prompts[0], **GREEDY)


def test_videos_with_different_numbers_of_windows(tiny, clips, prompts):
    visuals = [tiny.encode(clip, windows=n) for clip, n in zip(clips, (3, 1, 2), strict=True)]
    alone = [tiny.generate(v, text, **GREEDY) for v, text in zip(visuals, prompts, strict=True)]
    answers = tiny.answer(visuals, prompts, **GREEDY)
    assert [answer.answer for answer in answers] == alone
    assert [len(answer.windows) for answer in answers] == [3, 0, 2]
    # Asked of twice, so that they would share, were they equally long.
    again = [visuals[0], visuals[1], visuals[0]]
    expected = [tiny.generate(v, text, **GREEDY) for v, text in zip(again, prompts, strict=True)]
    assert tiny.generate(again, prompts, **GREEDY) == expected
    beams = {"num_beams": 2, "do_sample": False, "max_new_tokens": 6}
    alone = [tiny.generate(v, text, **beams) for v, text in zip(visuals, prompts, strict=True)]
    assert tiny.generate(visuals, prompts, **beams) == alone


def test_several_videos_in_windows(tiny, clips, prompts):
    alone = [tiny.generate(clip, text, windows=2, **GREEDY) for clip, text in zip(clips, prompts, strict=True)]
    assert tiny.generate(clips, prompts, windows=2, **GREEDY) == alone


def test_questions_share_the_windows_of_a_video(tiny, clips, prompts):
    rows = []
    hook = tiny.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    try:
        expected = [tiny.generate(clips[0], text, windows=3, **GREEDY) for text in prompts]
        for visual in (clips[0], tiny.encode(clips[0], windows=3, prefill=True)):
            rows.clear()
            assert tiny.generate(visual, prompts, windows=3 if visual is clips[0] else 1, **GREEDY) == expected
            assert [count for count, length in rows if length > 3 * 256] == [1] * (visual is clips[0])
    finally:
        hook.remove()


def test_decoded_frames_are_shared_out(tiny, clips, prompts):
    frames = load_frames(clips[0], 64)
    visual = tiny.encode(frames, windows=2)
    assert torch.equal(visual.tokens, torch.cat([tiny.encode(part).tokens for part in frames.split(32)]))
    assert [(w.start, w.end) for w in visual.windows] == [(None, None)] * 2
    assert tiny.generate(frames, prompts[0], windows=2, **GREEDY) == tiny.generate(visual, prompts[0], **GREEDY)


def test_what_does_not_fit_is_refused_at_once(tiny, clips, prompts, room, monkeypatch):
    text = len(tiny.tokenizer(prompts[0]).input_ids)
    full = 3 * 256 + text + 12
    room(full)
    visual = tiny.encode(clips[0], windows=3)
    assert tiny.generate(visual, prompts[0], **GREEDY) == tiny.generate(clips[0], prompts[0], windows=3, **GREEDY)
    room(full - 1)

    def must_not(*args):
        raise AssertionError("encoded")

    monkeypatch.setattr(tiny.model.video_model, "encode", must_not)
    message = (
        rf"generate: windows must be at most 2 for the language model's {full - 1} positions: 3 windows of 256 tokens, "
        rf"{text} of the prompt and 12 new ones are {full}$"
    )
    with pytest.raises(ValueError, match=message):
        tiny.generate(clips[0], prompts[0], windows=3, **GREEDY)
    with pytest.raises(ValueError, match=message):
        tiny.generate(visual, prompts[0], **GREEDY)
    for count in ({"max_length": text + 12}, {"generation_config": merv_generation(max_new_tokens=12)}):
        with pytest.raises(ValueError, match=message):
            tiny.generate(visual, prompts[0], do_sample=False, **count)
    # One window less in a list is not what decides.
    with pytest.raises(ValueError, match="windows must be at most 2"):
        tiny.generate([None, visual], prompts[0], **GREEDY)
    room(2 * 256)
    with pytest.raises(ValueError, match="windows must be at most 1 for the language model's 512 positions"):
        tiny.encode(clips[0], windows=2)


def merv_generation(**settings):
    from transformers import GenerationConfig

    return GenerationConfig(**settings)


@pytest.mark.parametrize("windows", [0, -1, 2.0, True, "2", None])
def test_windows_are_a_count(tiny, clips, windows):
    with pytest.raises(ValueError, match=f"generate: windows must be an int of at least 1, got {windows!r}"):
        tiny.encode(clips[0], windows=windows)
    with pytest.raises(ValueError, match="generate: windows must be an int"):
        tiny.generate(clips[0], "In: a\nOut:", windows=windows)


def test_says_what_cannot_be_cut(tiny, clips, tmp_path, room):
    import av

    room(10_000)
    with av.open(str(tmp_path / "a.png"), "w", format="image2", options={"update": "1"}) as file:
        stream = file.add_stream("png")
        stream.width, stream.height, stream.pix_fmt = 64, 64, "rgb24"
        file.mux(stream.encode(av.VideoFrame(64, 64, "rgb24")))
    with pytest.raises(merv_fast.VideoError, match=r"a\.png: is a single picture, which cannot be cut into 2 windows"):
        tiny.encode(tmp_path / "a.png", windows=2)
    with pytest.raises(
        merv_fast.VideoError, match="must have a frame for each of 21 windows, but 0 to 2 s of it hold 20"
    ):
        tiny.encode(clips[2], windows=21)
    with pytest.raises(merv_fast.VideoError, match=r"for each of 3 windows, but 1 to 1\.2 s of it hold 2"):
        tiny.encode(clips[2], windows=3, clip_start_sec=1.0, clip_end_sec=1.2)
    with pytest.raises(merv_fast.VideoError, match="lie outside the video"):
        tiny.encode(clips[2], windows=3, clip_start_sec=2.5)
    with pytest.raises(merv_fast.VideoError, match="does not exist"):
        tiny.encode(tmp_path / "none.mp4", windows=2)
    with pytest.raises(ValueError, match="generate: windows must be 1 without a video, got 2"):
        tiny.encode(None, windows=2)
    with pytest.raises(ValueError, match="generate: end_frame must be left out with windows, got 9"):
        tiny.encode(clips[2], windows=2, end_frame=9)
    with pytest.raises(
        ValueError, match=r"frames must be uint8 \[64, H, W, 3\], 32 for each of 2 windows, got torch.u"
    ):
        tiny.encode(load_frames(clips[2], 32), windows=2)
    with pytest.raises(ValueError, match="generate: windows must be left out for a video already encoded"):
        tiny.generate(tiny.encode(clips[2]), "In: a\nOut:", windows=2)


def test_a_fusion_without_weights_has_none_in_windows(clips):
    vidlm = build_tiny()
    tail = vidlm.model.video_model.tail
    plain = tail.forward
    tail.forward = lambda features: (plain(features)[0], None)
    visual = vidlm.encode(clips[2], windows=2)
    assert visual.encoder_weights is None
    assert [w.encoder_weights for w in visual.windows] == [None, None]
