from dataclasses import replace

import av
import pytest
import torch
from PIL import Image

import merv_fast.video.choice
from merv_fast.errors import VideoError
from merv_fast.video import load_frames, open_video
from merv_fast.video.base import DEFAULT_LIMITS
from merv_fast.video.choice import PROFILES, Choice, Header, choose_decoder, codec_obstacle, read_header
from merv_fast.video.dali import DaliVideo
from merv_fast.video.pyav import PyAVVideo
from tests.video.clips import indices_of, write_clip

H264 = Header("h264", "High", "yuv420p", (480, 640), 2, False, 1)
GPU = torch.device("cuda:0")
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """A function that pretends there is one GPU of a compute capability, and DALI."""

    def pretend(capability=(9, 0), dali=True):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(merv_fast.video.choice, "has_dali", lambda: dali)

    return pretend


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "clip.mp4", height=144, width=160, count=12, options={"bf": "2"})


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_what_every_engine_since_volta_decodes(capability, gpu):
    gpu(capability)
    for codec, profiles in PROFILES.items():
        if codec != "av1":
            header = replace(H264, codec=codec, profile=profiles and profiles[0])
            assert codec_obstacle(header, GPU) == ""


@pytest.mark.parametrize(
    ("capability", "decoded"),
    [((8, 0), False), ((8, 6), True), ((8, 9), True), ((9, 0), False), ((10, 0), True), ((8, 7), False)],
)
def test_av1_only_where_the_chip_has_it(capability, decoded, gpu):
    gpu(capability)
    obstacle = codec_obstacle(replace(H264, codec="av1", profile="Main"), GPU)
    major, minor = capability
    words = f"NVDEC of cuda:0 (compute capability {major}.{minor}) does not decode av1, as far as is known"
    assert obstacle == ("" if decoded else words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codec": "hevc", "profile": "Main 10", "pixel_format": "yuv420p10le"}, "hevc Main only, not Main 10"),
        ({"profile": "High 4:2:2", "pixel_format": "yuv422p"}, "not High 4:2:2"),
        ({"profile": None}, "not None"),
        ({"pixel_format": "yuv422p"}, "8-bit 4:2:0 only, not yuv422p"),
        ({"pixel_format": None}, "8-bit 4:2:0 only, not None"),
        ({"codec": "mjpeg"}, "does not decode mjpeg"),
        ({"codec": "prores"}, "does not decode prores"),
        ({"coded_size": (120, 640)}, "sides of 144 to 4096 pixels, not 640x120"),
        ({"coded_size": (480, 4098)}, "not 4098x480"),
        (
            {"codec": "mpeg4", "profile": "Simple Profile", "coded_size": (720, 1280)},
            "sides of 144 to 1024 pixels, not 1280x720",
        ),
        ({"matrix": 1}, "BT.601, the file names matrix 1 of"),
        ({"full_range": True}, "limited range only, not full"),
        ({"streams": 2}, "another one of the 2 streams"),
    ],
)
def test_what_is_left_to_pyav(change, words, gpu):
    gpu()
    assert codec_obstacle(H264, GPU) == ""
    assert words in codec_obstacle(replace(H264, **change), GPU)


@pytest.mark.parametrize("matrix", [2, 5, 6, 8])
def test_matrices_that_mean_bt601_to_pyav_too(matrix, gpu):
    gpu()
    assert codec_obstacle(replace(H264, matrix=matrix), GPU) == ""


def test_no_gpu_decodes_what_the_table_does_not_know(gpu):
    gpu((13, 0))
    assert "does not decode h264, as far as is known" in codec_obstacle(H264, GPU)


def test_the_cpu_side_of_dali():
    for codec in ("vp8", "vp9", "mjpeg"):
        assert codec_obstacle(replace(H264, codec=codec, full_range=True, coded_size=(8, 8)), CPU) == ""
    assert codec_obstacle(H264, CPU) == "on the CPU it decodes vp8, vp9, mjpeg, not h264"
    assert "8-bit 4:2:0 only" in codec_obstacle(replace(H264, codec="vp9", pixel_format="yuv420p10le"), CPU)


ENCODERS = {
    "mpeg4": ("mpeg4", {}, "Simple Profile"),
    "h264": ("libx264", {"profile": "main"}, "Main"),
    "hevc": ("libx265", {"x265-params": "log-level=none"}, "Main"),
    "vp8": ("libvpx", {"deadline": "realtime"}, None),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, "Profile 0"),
    "av1": ("libsvtav1", {"preset": "12"}, "Main"),
}


@pytest.mark.parametrize("codec", PROFILES)
def test_header_uses_the_table_s_names(codec, tmp_path, gpu):
    encoder, options, profile = ENCODERS[codec]
    path = write_clip(tmp_path / "clip.mkv", encoder, count=3, height=144, width=160, options=options)
    header = read_header(str(path), DEFAULT_LIMITS)
    assert header == Header(codec, profile, "yuv420p", (144, 160), header.matrix, False, 1)
    gpu((8, 9))
    assert codec_obstacle(header, GPU) == ""


def test_header_of_what_nvdec_is_not_trusted_with(tmp_path):
    ten = write_clip(
        tmp_path / "ten.mkv",
        "libx265",
        count=2,
        pix_fmt="yuv420p10le",
        options={"x265-params": "log-level=none"},
        colour=(1, 2),
    )
    header = read_header(str(ten), DEFAULT_LIMITS)
    assert (header.profile, header.pixel_format, header.matrix, header.full_range) == (
        "Main 10",
        "yuv420p10le",
        1,
        True,
    )
    header = read_header(str(write_clip(tmp_path / "422.mp4", count=2, pix_fmt="yuv422p")), DEFAULT_LIMITS)
    assert (header.profile, header.pixel_format, header.matrix) == ("High 4:2:2", "yuv422p", 2)


def test_dali_on_a_gpu(clip, gpu):
    gpu()
    choice = choose_decoder(clip, device="cuda")
    assert (choice.decoder, choice.device) == ("dali", GPU)
    assert choice.reason == "NVDEC of cuda:0 (compute capability 9.0) decodes h264"
    video = open_video(clip, device="cuda")
    assert isinstance(video, DaliVideo)
    assert video.decoder == "DALI (h264, NVDEC of cuda:0)"
    plain = open_video(clip)
    assert (len(video), video.fps, video.size, video.duration) == (12, 25.0, (144, 160), plain.duration)


def test_pyav_where_no_gpu_is_asked_for(clip, gpu):
    gpu()
    for device in (None, "cpu", CPU):
        assert choose_decoder(clip, device=device) == Choice("pyav", "frames are wanted on the CPU")
    assert choose_decoder(clip, "pyav", "cuda") == Choice("pyav", "asked for")
    assert isinstance(open_video(clip), PyAVVideo)
    assert isinstance(open_video(clip, decoder="pyav", device="cuda"), PyAVVideo)


def test_pyav_where_dali_is_not_installed(clip, gpu):
    gpu(dali=False)
    choice = choose_decoder(clip, device="cuda")
    assert choice == Choice("pyav", "NVIDIA DALI is not installed (pip install 'merv-fast[dali]')")
    assert isinstance(open_video(clip, device="cuda"), PyAVVideo)
    with pytest.raises(RuntimeError, match=r"decoder 'dali' needs NVIDIA DALI: pip install 'merv-fast\[dali\]'"):
        load_frames(clip, 4, decoder="dali")


def cut_short(path, tmp_path):
    source = write_clip(tmp_path / "whole.mkv", count=60, height=144, width=160)
    path.write_bytes(source.read_bytes()[: source.stat().st_size * 2 // 3])


def without_times(path, tmp_path):
    write_clip(path, height=144, width=160, options={"bf": "3", "b-pyramid": "normal"})


def with_hidden_pictures(path, tmp_path):
    source = write_clip(tmp_path / "plain.webm", "libvpx", height=144, width=160, options={"deadline": "realtime"})
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(video=0):
            if not packet.size:
                continue
            data = bytearray(bytes(packet))
            packet.stream = stream
            time = packet.pts
            writer.mux(packet)
            if time % 200 == 0:
                data[0] &= ~0x10
                hidden = av.Packet(bytes(data))
                hidden.stream, hidden.time_base = stream, packet.time_base
                hidden.pts = hidden.dts = time + 1
                writer.mux(hidden)


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("cut.mkv", cut_short, "the file is truncated or damaged"),
        ("bare.avi", without_times, "the file gives no presentation times that can be trusted"),
        ("hidden.webm", with_hidden_pictures, "not every packet of the file is a frame that is shown"),
    ],
)
def test_files_whose_frames_dali_would_number_otherwise(name, make, words, tmp_path, gpu):
    make(tmp_path / name, tmp_path)
    gpu()
    assert choose_decoder(tmp_path / name, device="cuda") == Choice("pyav", words)
    with pytest.raises(VideoError, match=f"cannot be decoded by DALI: {words}"):
        open_video(tmp_path / name, decoder="dali", device="cuda")


def test_a_file_that_would_fill_the_memory(clip, gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(merv_fast.video.choice, "DALI_BYTES", clip.stat().st_size - 1)
    assert "in memory" in choose_decoder(clip, device="cuda").reason
    monkeypatch.setattr(merv_fast.video.choice, "DALI_BYTES", clip.stat().st_size)
    assert choose_decoder(clip, device="cuda").decoder == "dali"


def test_pictures_and_folders(tmp_path, gpu):
    gpu()
    Image.new("RGB", (160, 144)).save(tmp_path / "a.png")
    assert choose_decoder(tmp_path, device="cuda").reason == "it is a folder of pictures"
    assert choose_decoder(tmp_path / "a.png", device="cuda").reason == "it is a picture"
    assert len(open_video(tmp_path, device="cuda")) == 1
    for path in (tmp_path, tmp_path / "a.png"):
        with pytest.raises(VideoError, match="cannot be decoded by DALI: it is a"):
            open_video(path, decoder="dali")


def test_says_what_is_wrong(clip, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="decoder must be one of auto, pyav, dali, got 'decord'"):
        open_video(clip, decoder="decord")
    for device in ("cuda", "cuda:1", "mps"):
        with pytest.raises(
            ValueError, match=f"device must be cpu or one of the 0 GPUs that PyTorch sees, got {device}"
        ):
            load_frames(clip, 2, device=device)


def test_frames_for_a_gpu_are_put_into_page_locked_memory(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", count=3)
    asked = []
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(merv_fast.video.choice, "has_dali", lambda: False)
    monkeypatch.setattr(
        torch, "empty", lambda *shape, pin_memory=False, **kwargs: asked.append(pin_memory) or empty(*shape, **kwargs)
    )
    assert not open_video(path, device="cpu").pinned
    video = open_video(path, device="cuda:0")
    assert video.pinned
    assert indices_of(video.frames_at([2, 0])) == [2, 0]
    assert asked == [True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_frames_of_the_cpu_on_a_gpu(tmp_path):
    path = write_clip(tmp_path / "clip.mp4")
    frames = load_frames(path, 16, decoder="pyav", device="cuda")
    assert frames.is_cuda
    assert torch.equal(frames.cpu(), load_frames(path, 16))
    assert open_video(path, decoder="pyav", device="cuda").frames_at([0]).is_pinned()
