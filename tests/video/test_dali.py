"""DALI's CPU side runs the code that a GPU would: it decodes VP8, VP9 and MJPEG."""

import gc
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from merv_fast.errors import VideoError
from merv_fast.video import load_frames, open_video
from merv_fast.video.dali import DaliVideo, context, decode_together
from tests.budgets import DALI_LEVELS
from tests.video.clips import indices_of, write_clip

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")


VP9 = {"deadline": "realtime", "cpu-used": "8"}
KINDS = {
    "vp9.webm": ("libvpx-vp9", VP9, {}),
    "vp9.mp4": ("libvpx-vp9", VP9, {}),
    "vp8.webm": ("libvpx", {"deadline": "realtime"}, {}),
    "mjpeg.avi": ("mjpeg", {}, {"pix_fmt": "yuvj420p"}),
    "odd-size.webm": ("libvpx-vp9", VP9, {"height": 63, "width": 131}),
}


def write(path, kind="vp9.webm", **more):
    codec, options, own = KINDS[kind]
    return write_clip(path, codec, options=options, **own | more)


def overwrite(path, data):
    path.write_bytes(bytes(data))


def noise(size):
    return np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8).tobytes()


def difference(a, b):
    return (a.int() - b.int()).abs().max().item()


@pytest.mark.parametrize("kind", KINDS)
def test_same_frames_as_pyav(kind, tmp_path):
    path = write(tmp_path / kind, kind)
    video, plain = open_video(path, decoder="dali"), open_video(path)
    assert isinstance(video, DaliVideo)
    for name in ("path", "fps", "duration", "size"):
        assert getattr(video, name) == getattr(plain, name)
    assert len(video) == len(plain) == 30
    for asked in ([29, 3, 3, 17, 0, 29, 16], [29], list(range(30)), [0, 0], [5, 1]):
        frames = video.frames_at(asked)
        assert frames.shape == (len(asked), *video.size, 3)
        assert frames.dtype == torch.uint8
        assert indices_of(frames) == asked
        assert difference(frames, plain.frames_at(asked)) <= DALI_LEVELS


@pytest.mark.parametrize("flags", [(6, 1), (5, 2), (2, 0)], ids=["601", "601-full", "unspecified"])
def test_same_colours_as_pyav(flags, tmp_path):
    import av

    frames = []
    for planes in ((90, 100, 210), (160, 60, 80), (60, 210, 110), (235, 128, 128), (16, 128, 128)):
        frames.append(av.VideoFrame(64, 64, "yuv420p"))
        for plane, value in zip(frames[-1].planes, planes, strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        frames[-1].colorspace, frames[-1].color_range = flags
    path = write(tmp_path / "colour.webm", height=64, width=64, frames=frames, colour=flags)
    got, expected = (open_video(path, decoder=decoder).frames_at(range(5)) for decoder in ("dali", "pyav"))
    assert difference(got, expected) <= DALI_LEVELS


def test_bt709_is_refused(tmp_path):
    path = write(tmp_path / "709.webm", colour=(1, 1))
    with pytest.raises(VideoError, match=r"cannot be decoded by DALI: it converts colours by BT\.601"):
        open_video(path, decoder="dali")


@pytest.mark.parametrize(
    "rotation", [(90, False, False), (180, False, False), (270, True, False), (0, True, False), (90, False, True)]
)
def test_rotation(rotation, tmp_path):
    path = write(tmp_path / "turned.mp4", rotation=rotation, count=4)
    video, plain = open_video(path, decoder="dali"), open_video(path)
    assert video.size == plain.size
    assert video.frames_at([3, 1]).is_contiguous()
    assert difference(video.frames_at([3, 1]), plain.frames_at([3, 1])) <= DALI_LEVELS


def test_variable_frame_rate(tmp_path):
    times = [0, 1, 2, 5, 6, 20, 21, 22, 23, 40, 41, 70]
    video = open_video(write(tmp_path / "vfr.webm", count=len(times), pts=times), decoder="dali")
    assert indices_of(video.frames_at([11, 0, 5, 6])) == [11, 0, 5, 6]


def test_load_frames(tmp_path):
    path = write(tmp_path / "clip.webm", count=100)
    assert indices_of(load_frames(path, 32, decoder="dali")) == indices_of(load_frames(path, 32))


def test_truncated_file_is_pyav_s(tmp_path):
    path = write(tmp_path / "cut.webm", count=60)
    overwrite(path, path.read_bytes()[: path.stat().st_size * 7 // 10])
    with pytest.raises(VideoError, match="cannot be decoded by DALI: the file is truncated or damaged"):
        open_video(path, decoder="dali")
    frames = load_frames(path, 8)
    assert indices_of(frames)[-1] > 20


def test_file_cut_short_after_opening_gives_an_error_and_no_black(tmp_path):
    path = write(tmp_path / "cut.webm", count=60)
    video = open_video(path, decoder="dali")
    whole = path.read_bytes()
    overwrite(path, whole[: len(whole) // 2])
    with pytest.raises(VideoError, match=r"cannot be decoded by DALI: .*out-of-bounds frame index 59"):
        video.frames_at([0, 59])
    assert indices_of(video.frames_at([0, 7])) == [0, 7]
    overwrite(path, b"")
    with pytest.raises(VideoError, match="cannot be decoded by DALI"):
        video.frames_at([0])
    os.remove(path)
    with pytest.raises(VideoError, match="cannot be read"):
        video.frames_at([0])


def test_damage_that_only_decoding_finds(tmp_path):
    path = write(tmp_path / "bad.webm", count=60, height=96, width=160)
    data = bytearray(path.read_bytes())
    start = len(data) // 2
    data[start : start + len(data) // 50] = noise(len(data) // 50)
    overwrite(path, data)
    video = open_video(path, decoder="dali")
    with pytest.raises(VideoError, match=r"cannot be decoded by DALI: .*Failed to send packet to decoder"):
        video.frames_at(range(60))


def test_garbage(tmp_path):
    path = write(tmp_path / "clip.webm")
    video = open_video(path, decoder="dali")
    whole = path.read_bytes()
    overwrite(path, noise(5000))
    with pytest.raises(VideoError, match="is not a video"):
        open_video(path, decoder="dali")
    with pytest.raises(VideoError, match=r"cannot be decoded by DALI: .*Failed to create video decoder"):
        video.frames_at([0])
    overwrite(path, whole)
    assert indices_of(video.frames_at([4, 2])) == [4, 2]


def test_file_of_another_size_in_its_place(tmp_path):
    path = write(tmp_path / "clip.webm")
    video = open_video(path, decoder="dali")
    write(path, height=96, width=160)
    with pytest.raises(VideoError, match=r"DALI gave frames of shape \(1, 96, 160, 3\), expected \(1, 64, 128, 3\)"):
        video.frames_at([0])


def test_one_decoder_for_several_files(tmp_path):
    before = context(torch.device("cpu"))
    open_video(write(tmp_path / "first.webm"), decoder="dali").frames_at([0])
    decoders = list(before._instance_cache.values())
    for number, kind in enumerate(KINDS):
        path = write(tmp_path / f"{number}{kind}", kind)
        assert indices_of(open_video(path, decoder="dali").frames_at([7, 3])) == [7, 3]
    assert context(torch.device("cpu")) is before
    assert list(before._instance_cache.values()) == decoders


def test_frames_outlive_their_video(tmp_path):
    path = write(tmp_path / "clip.webm")
    frames = open_video(path, decoder="dali").frames_at(range(10))
    for _ in range(5):
        open_video(path, decoder="dali").frames_at(range(10, 20))
    gc.collect()
    assert indices_of(frames) == list(range(10))


def test_no_copy(tmp_path, monkeypatch):
    addresses = []
    from_dlpack = torch.from_dlpack

    def watched(sample):
        addresses.append(np.asarray(sample).ctypes.data)
        return from_dlpack(sample)

    monkeypatch.setattr(torch, "from_dlpack", watched)
    video = open_video(write(tmp_path / "clip.webm"), decoder="dali")
    assert video.frames_at([2, 5, 9]).data_ptr() == addresses[0]


def test_several_files_at_once(tmp_path):
    sizes = {"vp9.webm": 64, "vp8.webm": 80, "mjpeg.avi": 96}
    videos = [open_video(write(tmp_path / kind, kind, height=height), decoder="dali") for kind, height in sizes.items()]
    asked = [[5, 29, 5], [], range(12)]
    frames = decode_together(videos, asked)
    assert [tuple(part.shape) for part in frames] == [(3, 64, 128, 3), (0, 80, 128, 3), (12, 96, 128, 3)]
    assert [indices_of(part) for part in frames] == [list(part) for part in asked]
    overwrite(tmp_path / "vp8.webm", noise(5000))
    with pytest.raises(VideoError, match="or one of 2 files decoded with it"):
        decode_together(videos, [[0], [0], [0]])


def test_pickles_and_serves_several_threads(tmp_path):
    video = pickle.loads(pickle.dumps(open_video(write(tmp_path / "clip.webm"), decoder="dali")))
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda start: indices_of(video.frames_at(range(start, 30, 4))), range(4)))
    assert parts == [list(range(start, 30, 4)) for start in range(4)]


def read_into(queue, video):
    try:
        queue.put(indices_of(video.frames_at([5])))
    except VideoError as error:
        queue.put(error)


def test_a_forked_process_is_told_so_instead_of_waiting_for_ever(tmp_path):
    video = open_video(write(tmp_path / "clip.webm"), decoder="dali")
    assert indices_of(video.frames_at([3])) == [3]
    workers = multiprocessing.get_context("fork")
    queue = workers.Queue()
    process = workers.Process(target=read_into, args=(queue, video))
    process.start()
    try:
        got = queue.get(timeout=60)
    finally:
        process.kill()
        process.join()
    assert "cannot be decoded by DALI: its threads do not live on in a forked process" in str(got)
    assert indices_of(video.frames_at([4])) == [4]


def test_no_frames_and_wrong_indices(tmp_path):
    video = open_video(write(tmp_path / "clip.webm", count=5), decoder="dali")
    assert video.frames_at([]).shape == (0, 64, 128, 3)
    for index in (-1, 5):
        with pytest.raises(ValueError, match=rf"frames_at: indices must lie in 0\.\.4, got {index}"):
            video.frames_at([0, index])
    with pytest.raises(TypeError):
        video.frames_at([0.5])
    read = []
    video._read([1, 3], lambda index, frame: read.append((index, frame.shape)))
    assert read == [(1, (64, 128, 3)), (3, (64, 128, 3))]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_nvdec(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", height=144, width=160, options={"bf": "3", "g": "12"})
    video = open_video(path, decoder="dali", device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        frames = video.frames_at([29, 3, 3, 17, 0])
        assert frames.is_cuda
        assert indices_of(frames.cpu()) == [29, 3, 3, 17, 0]
    assert indices_of(video.frames_at(range(30)).cpu()) == list(range(30))
    with pytest.raises(VideoError, match="cannot be decoded by DALI: on the CPU"):
        open_video(path, decoder="dali", device="cpu")
