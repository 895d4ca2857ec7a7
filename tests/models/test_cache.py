"""MervModel with a VideoCache: what is found is, to the bit, what would have been computed."""

import copy
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import merv_fast
from merv_fast.runtime.cache import VideoCache
from merv_fast.runtime.cache.video_cache import CacheCounts
from merv_fast.video import load_frames
from tests.models.random_merv import build_tiny
from tests.models.test_merv_model import GREEDY, QUESTIONS, prompt

COMPUTED = ["decode", "prepare", "encode", "fuse"]


@pytest.fixture
def vidlm(tiny):
    """merv-tiny with a cache."""
    tiny.cache = VideoCache()
    yield tiny
    tiny.cache = None


@pytest.fixture
def prompts(tiny):
    return [prompt(tiny, question) for question in QUESTIONS]


def plain(vidlm, *args, **kwargs):
    """What the model gives without its cache."""
    cache, vidlm.cache = vidlm.cache, None
    try:
        return vidlm.encode(*args, **kwargs)
    finally:
        vidlm.cache = cache


def same(got, expected):
    return torch.equal(got.tokens, expected.tokens) and got.encoder_weights == expected.encoder_weights


@pytest.mark.parametrize("keep", ["tokens", "features"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_what_is_found_is_what_would_be_computed(tiny, clips, tmp_path, keep, where):
    folder = None if where == "memory" else tmp_path
    tiny.cache = VideoCache(folder=folder, keep=keep)
    try:
        for clip in clips:
            assert same(tiny.encode(clip), plain(tiny, clip))
        if where == "disk":
            tiny.cache = VideoCache(max_bytes=0, folder=folder, keep=keep)
        for clip in clips:
            assert same(tiny.encode(clip), plain(tiny, clip))
        assert tiny.cache.counts.hits == 3
    finally:
        tiny.cache = None


def test_a_hit_skips_every_stage(vidlm, clips, prompts):
    (first,) = vidlm.answer(clips[0], prompts[0], **GREEDY)
    (second,) = vidlm.answer(clips[0], prompts[0], **GREEDY)
    assert all(first.timings_ms[stage] > 0 for stage in COMPUTED)
    assert all(second.timings_ms[stage] == 0 for stage in COMPUTED)
    assert list(second.timings_ms) == ["cache", *COMPUTED, "generate"]
    assert second.timings_ms["cache"] > 0
    assert (second.answer, second.encoder_weights) == (first.answer, first.encoder_weights)
    assert vidlm.cache.counts == CacheCounts(hits=1, misses=1)


def test_only_missing_videos_are_encoded(vidlm, clips, prompts, monkeypatch):
    vidlm.encode(clips[1])
    batches, encode = [], vidlm.model.video_model.encode
    monkeypatch.setattr(vidlm.model.video_model, "encode", lambda x: batches.append(len(x[0])) or encode(x))
    answers = vidlm.generate([*clips, clips[1]], [*prompts, prompts[0]], **GREEDY)
    assert batches == [2]
    assert vidlm.generate([*clips, clips[1]], [*prompts, prompts[0]], **GREEDY) == answers
    assert batches == [2]


def test_a_caller_may_write_to_what_it_gets(vidlm, clips):
    for _ in range(3):
        got = vidlm.encode(clips[0])
        assert same(got, plain(vidlm, clips[0]))
        with torch.inference_mode():
            got.tokens.zero_()


def test_videos_count_by_content(vidlm, clips, tmp_path):
    vidlm.encode(clips[0])
    shutil.copy(clips[0], tmp_path / "another.mp4")
    vidlm.encode(tmp_path / "another.mp4")
    assert vidlm.cache.counts.hits == 1
    shutil.copy(clips[1], tmp_path / "another.mp4")
    assert same(vidlm.encode(tmp_path / "another.mp4"), plain(vidlm, clips[1]))
    shutil.copy(clips[0], tmp_path / "another.gif")  # opened by another rule, so another video
    vidlm.encode(tmp_path / "another.gif")
    assert vidlm.cache.counts == CacheCounts(hits=1, misses=3)


def test_frames_and_no_video_are_kept_too(vidlm, clips):
    frames = load_frames(clips[0], 32)
    for source in (frames, frames.clone(), None, None):
        assert same(vidlm.encode(source), plain(vidlm, source))
    assert vidlm.cache.counts == CacheCounts(hits=2, misses=2)
    frames[5, 3, 2, 1] ^= 1
    vidlm.encode(frames)
    assert vidlm.cache.counts.misses == 3


def test_every_choice_has_its_own_entry(vidlm, clips):
    choices = [
        {},
        {"clip_start_sec": 1.0},
        {"clip_end_sec": 2.0},
        {"clip_start_sec": 1.0, "clip_end_sec": 2.0},
        {"end_frame": 10},
        {"end_frame": 11},
    ]
    for _ in range(2):
        for choice in choices:
            assert same(vidlm.encode(clips[0], **choice), plain(vidlm, clips[0], **choice)), choice
    assert vidlm.cache.counts == CacheCounts(hits=6, misses=6)
    for equal in ({"clip_start_sec": None}, {"decoder": "pyav"}, {"clip_start_sec": float("nan")}):
        vidlm.encode(clips[0], **equal)
    assert vidlm.cache.counts.misses == 6


def test_a_folder_counts_by_its_pictures_and_its_rate(vidlm, tmp_path):
    import av

    with av.open(str(merv_fast.sample_clip())) as file:
        for index, frame in zip(range(8), file.decode(video=0), strict=False):
            with av.open(str(tmp_path / f"{index}.png"), "w", format="image2", options={"update": "1"}) as picture:
                stream = picture.add_stream("png")
                stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "rgb24"
                picture.mux(stream.encode(frame.reformat(format="rgb24")))
    for fps in (None, 4.0, None, 4.0):
        vidlm.encode(tmp_path, fps=fps)
    assert vidlm.cache.counts == CacheCounts(hits=2, misses=2)
    (tmp_path / "0.png").rename(tmp_path / "9.png")
    assert same(vidlm.encode(tmp_path), plain(vidlm, tmp_path))
    assert vidlm.cache.counts.misses == 3


@pytest.mark.parametrize("keep", ["tokens", "features"])
def test_weights_that_change_change_the_key(clips, keep):
    vidlm = build_tiny()
    vidlm.cache = VideoCache(keep=keep)
    model = vidlm.model.video_model
    changes = [next(model.encoders["vivit"].parameters()), next(model.tail.projectors[2].parameters())]
    vidlm.encode(clips[2])
    for weight in changes:
        with torch.no_grad():
            weight[0] += 0.5
        assert same(vidlm.encode(clips[2]), plain(vidlm, clips[2]))
    # Features do not depend on projectors, so the second change costs no encoding.
    assert vidlm.cache.counts == CacheCounts(hits=int(keep == "features"), misses=2 + int(keep == "tokens"))


def test_a_write_that_is_not_counted_needs_eval(clips):
    vidlm = build_tiny()
    vidlm.cache = VideoCache()
    vidlm.encode(clips[2])
    vidlm.model.video_model.tail.fusion.Q.data.mul_(-3)
    assert same(vidlm.eval().encode(clips[2]), plain(vidlm, clips[2]))


def test_another_dtype_or_model_has_its_own_entries(clips):
    cache = VideoCache()
    for vidlm in (build_tiny(0), build_tiny(1), build_tiny(0).to(torch.bfloat16), build_tiny(0)):
        vidlm.cache = cache
        assert same(vidlm.encode(clips[2]), plain(vidlm, clips[2]))
    assert cache.counts == CacheCounts(hits=1, misses=3)


def test_settings_that_change_results_change_the_key(vidlm, clips, monkeypatch):
    vidlm.encode(clips[2])
    with torch.autocast("cpu", torch.bfloat16):
        assert same(vidlm.encode(clips[2]), plain(vidlm, clips[2]))
    monkeypatch.setattr(merv_fast, "__version__", "99")
    vidlm.encode(clips[2])
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    vidlm.encode(clips[2])
    assert vidlm.cache.counts == CacheCounts(misses=4)


def test_a_model_in_training_keeps_nothing(clips):
    vidlm = build_tiny()
    vidlm.cache = VideoCache()
    vidlm.model.video_model.encoders["dinov2"].train()
    for _ in range(2):
        vidlm.encode(clips[2])
    assert vidlm.cache.counts == CacheCounts()
    assert len(vidlm.cache.memory) == 0


def test_a_file_that_changes_while_it_is_read_is_not_kept(vidlm, clips, tmp_path, monkeypatch):
    import merv_fast.models.encoding as encoding

    path = shutil.copy(clips[0], tmp_path / "clip.mp4")
    read = encoding.load_frames

    def replaced(*args, **kwargs):
        shutil.copy(clips[1], path)
        return read(*args, **kwargs)

    monkeypatch.setattr(encoding, "load_frames", replaced)
    assert same(vidlm.encode(path), plain(vidlm, clips[1]))
    monkeypatch.undo()
    assert len(vidlm.cache.memory) == 0
    assert same(vidlm.encode(clips[0]), plain(vidlm, clips[0]))


def test_errors_are_the_same(vidlm, tmp_path, clips):
    (tmp_path / "empty.mp4").touch()
    for name, reason in (("empty.mp4", "is an empty file"), ("none.mp4", "does not exist")):
        with pytest.raises(merv_fast.VideoError, match=reason):
            vidlm.encode(tmp_path / name)
    vidlm.encode(clips[0])
    with pytest.raises(merv_fast.VideoError, match="lie outside the video"):
        vidlm.encode(clips[0], clip_start_sec=99.0)
    with pytest.raises(ValueError, match="decoder must be one of"):
        vidlm.encode(clips[0], decoder="decord")
    assert vidlm.cache._under_way == {}


def test_a_copied_model_has_a_copied_cache(clips):
    vidlm = build_tiny()
    vidlm.cache = VideoCache()
    vidlm.encode(clips[2])
    other = copy.deepcopy(vidlm)
    assert other.cache is not vidlm.cache
    assert same(other.encode(clips[2]), vidlm.encode(clips[2]))


@pytest.mark.parametrize("cached", [True, False])
def test_eight_threads_call_one_model(tiny, clips, prompts, cached):
    """Answers, weights and tokens are those of one call at a time, and no video is encoded twice."""
    jobs = [(clip, text) for clip in clips for text in prompts] * 2
    expected = {job: tiny.answer(*job, **GREEDY)[0] for job in jobs[:9]}
    encoded = {clip: tiny.encode(clip) for clip in clips}
    tiny.cache = VideoCache() if cached else None

    def call(index):
        clip, text = jobs[index % len(jobs)]
        match index % 4:
            case 0:
                return same(tiny.encode(clip), encoded[clip])
            case 1:
                return tiny.generate(clip, [text, text], **GREEDY) == [expected[clip, text].answer] * 2
        (answer,) = tiny.answer(clip, text, **GREEDY)
        want = expected[clip, text]
        return (answer.answer, answer.encoder_weights) == (want.answer, want.encoder_weights)

    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(call, range(32)))
        assert not cached or tiny.cache.counts.misses == 3
    finally:
        tiny.cache = None


def test_threads_take_turns_at_the_tokenizer(tiny, clips, prompts, monkeypatch):
    """It is told to cut, cuts, and is told not to: another thread in between would leave a prompt whole."""
    monkeypatch.setattr(tiny.config, "max_text_length", 12)
    visual = tiny.encode(clips[0])
    expected = {text: tiny.generate(visual, text, **GREEDY) for text in prompts}
    tell = tiny.tokenizer.set_truncation_and_padding

    def slowly(*args, **kwargs):
        tell(*args, **kwargs)
        time.sleep(0.005)

    monkeypatch.setattr(tiny.tokenizer, "set_truncation_and_padding", slowly)
    with ThreadPoolExecutor(8) as pool:
        asked = prompts * 8
        assert list(pool.map(lambda text: tiny.generate(visual, text, **GREEDY), asked)) == [expected[t] for t in asked]
