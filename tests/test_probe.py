import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import merv_fast.video.choice
from merv_fast import sample_clip
from merv_fast.cli.app import app, main
from merv_fast.cli.probe import encoders_of, turns
from merv_fast.models.sources import Sources
from merv_fast.video import every, open_video, sample_indices
from merv_fast.video.drawing import BACKGROUND, BRIGHT, GLYPHS, png, write
from merv_fast.video.orientation import Orientation
from merv_fast.video.sheet import Row, contact_sheet
from tests.models.golden_run import write_run
from tests.video.clips import write_clip

runner = CliRunner()
TINY = {"languagebind": 16, "dinov2": 16, "vivit": 32, "siglip": 16}
SHARES = {name: every(torch.tensor(sample_indices(100, 25.0, 32)), count).tolist() for name, count in TINY.items()}


def probe(*arguments, **env):
    done = runner.invoke(app, ["probe", *map(str, arguments)], env={"COLUMNS": "200"} | env)
    assert done.exit_code == 0, done.output
    return done.stdout


def report(*arguments):
    return json.loads(probe(*arguments, "--json"))


def test_as_json(random_merv):
    clip = str(sample_clip())
    got = report(clip, "--model", random_merv)
    encoders = got.pop("encoders")
    assert {name: encoder["frames"] for name, encoder in encoders.items()} == SHARES
    assert {encoder["size"] for encoder in encoders.values()} == {112}
    assert [encoder["resize"] for encoder in encoders.values()] == ["resize-crop", *["resize-naive"] * 3]
    assert got == {
        "path": clip,
        "codec": "h264",
        "profile": "High",
        "pixel_format": "yuv420p",
        "width": 320,
        "height": 240,
        "rotation": 0,
        "mirrored": False,
        "fps": 25.0,
        "frames": 100,
        "duration": 4.0,
        "decoder": open_video(clip).decoder,
        "reason": "frames are wanted on the CPU",
        "model": str(random_merv),
        "sheet": None,
    }


def test_for_a_person(random_merv):
    text = probe(sample_clip(), "--model", random_merv)
    for words in (
        "h264, High, yuv420p",
        "320x240",
        "25/s",
        "100 in 4.000 s",
        "PyAV (h264",
        "frames are wanted on the CPU",
        "16 x 112x112, resize-naive",
        " ".join(map(str, SHARES["vivit"])),
        *TINY,
    ):
        assert words in text
    assert re.search(r"rotation +│ none", text)
    narrow = "".join(probe(sample_clip(), COLUMNS="60"))
    assert "…" not in narrow


def test_a_part_of_the_video(random_merv):
    part = report(sample_clip(), "--start", 1, "--end", 3, "--model", random_merv)
    assert part["encoders"]["vivit"]["frames"] == sample_indices(100, 25.0, 32, 1.0, 3.0)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation(degrees, tmp_path):
    got = report(write_clip(tmp_path / "turned.mp4", count=3, rotation=(degrees, False, False)))
    assert (got["rotation"], got["mirrored"]) == (degrees, False)
    assert (got["width"], got["height"]) == ((64, 128) if degrees % 180 else (128, 64))


@pytest.mark.parametrize("index", range(8))
def test_turns_describe_every_orientation(index):
    orientation = Orientation(bool(index & 1), bool(index & 2), bool(index & 4))
    degrees, mirrored = turns(orientation)
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    shown = np.rot90(stored, degrees // 90)
    assert np.array_equal(orientation.apply(stored), shown[:, ::-1] if mirrored else shown)


def test_a_mirrored_video_says_so(tmp_path):
    path = write_clip(tmp_path / "mirrored.mp4", count=3, rotation=(90, True, False))
    assert "90 degrees counter-clockwise, then mirrored" in probe(path)


def test_a_picture_and_a_folder(random_merv, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    got = report(tmp_path / "a.png", "--model", random_merv)
    assert (got["codec"], got["fps"], got["frames"], got["duration"]) == (None, 0.0, 1, None)
    assert got["encoders"]["vivit"]["frames"] == [0] * 32
    assert got["decoder"] == "PyAV (png picture)"
    assert report(tmp_path, "--fps", 5)["fps"] == 5.0
    assert "codec" not in probe(tmp_path)


def test_a_decoder_on_a_gpu_and_why(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", height=144, width=160, count=4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(merv_fast.video.choice, "has_dali", lambda: True)
    got = report(path, "--device", "cuda:0")
    assert got["decoder"] == "DALI (h264, NVDEC of cuda:0)"
    assert got["reason"] == "NVDEC of cuda:0 (compute capability 9.0) decodes h264"


def test_only_the_sheet_decodes_more_than_a_frame(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("decoded")

    monkeypatch.setattr(merv_fast.video.Video, "frames_at", refuse)
    report(sample_clip())


def read_line(sheet, top, left, count):
    """The text drawn in letters of single dots."""
    table = {dots: letter for letter, dots in GLYPHS.items()}
    text = ""
    for place in range(count):
        cell = sheet[top : top + 7, left + 6 * place : left + 6 * place + 5]
        bits = (cell != np.array(BACKGROUND, np.uint8)).any(-1)
        text += table[tuple(int("".join("01"[bit] for bit in row), 2) for row in bits.astype(int))]
    return text.strip()


def test_sheet(random_merv, tmp_path):
    out = tmp_path / "sheet.png"
    asked = (sample_clip(), "--model", random_merv, "--sheet", out)
    assert report(*asked)["sheet"] == str(out)
    assert f"contact sheet: {out}" in probe(*asked).replace("\n", "")
    sheet = np.asarray(Image.open(out))
    assert Image.open(out).mode == "RGB"
    # Margins of 24, eight tiles of 112 with 6 between them; ten lines of tiles.
    assert sheet.shape == (1556, 986, 3)
    frames = open_video(sample_clip()).frames_at(SHARES["vivit"]).numpy()
    top, seen = 0, {}
    for name, count in TINY.items():
        top += 50 + 36 if name == "languagebind" else 112 + 14 + 14 + 36
        for place in range(count):
            row, column = divmod(place, 8)
            if place and not column:
                top += 112 + 14 + 6
            left = 24 + 118 * column
            seen[name, place] = sheet[top : top + 112, left : left + 112]
            assert read_line(sheet, top + 116, left, 2) == str(SHARES[name][place])
            assert (sheet[top + 112 : top + 116, left : left + 112] == BACKGROUND).all()
            assert row < 4
    # The frames as Pillow resizes them, which is how three of the encoders see them.
    for name, method in {"dinov2": "BICUBIC", "vivit": "BILINEAR", "siglip": "BICUBIC"}.items():
        for place, index in enumerate(SHARES[name]):
            frame = Image.fromarray(frames[SHARES["vivit"].index(index)])
            assert np.array_equal(seen[name, place], frame.resize((112, 112), Image.Resampling[method]))
    # LanguageBind's is the centre, undistorted.
    centre = Image.fromarray(frames[0][:, 40:280]).resize((112, 112), Image.Resampling.BILINEAR)
    off = np.abs(seen["languagebind", 0].astype(int) - np.asarray(centre)).mean()
    squeezed = np.abs(seen["languagebind", 0].astype(int) - seen["dinov2", 0]).mean()
    assert off * 4 < squeezed


def test_small_frames_are_enlarged_by_whole_numbers():
    frames = torch.arange(2 * 30 * 30 * 3).view(2, 30, 30, 3).to(torch.uint8)
    sheet = contact_sheet("title", [Row("a", "b", frames, [0, 1])])
    side = 120
    area = sheet[50 + 36 : 50 + 36 + side, 24 + side + 6 : 24 + side + 6 + side]
    assert torch.equal(area[::4, ::4], frames[1])
    assert torch.equal(area[3::4, 3::4], frames[1])


def test_letters_are_told_apart():
    assert len(set(GLYPHS.values())) == len(GLYPHS)
    sheet = torch.tensor(BACKGROUND, dtype=torch.uint8).repeat(9, 40, 1)
    assert write(sheet, "a7_x", 1, 2, BRIGHT, 1) == 2 + 4 * 6
    assert read_line(sheet.numpy(), 1, 2, 4) == "A7_X"
    unchanged = sheet.clone()
    write(sheet, "é", 1, 30, BRIGHT, 1)
    assert not torch.equal(sheet, unchanged)
    write(sheet, "cut off at the edge", 1, 36, BRIGHT, 1)


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (64, 3)])
def test_png_is_lossless(shape, tmp_path):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    (tmp_path / "a.png").write_bytes(png(pixels))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), pixels.numpy())


def test_a_run_of_the_reference_needs_no_weights(tmp_path):
    write_run(tmp_path)
    run = tmp_path / "run"
    (run / "checkpoints" / "latest-checkpoint.pt").unlink()
    config = json.loads((run / "config.json").read_text())["model"]
    config["num_frames"] = [32 if "vivit" in encoder else 16 for encoder in config["video_backbone_ids"]]
    (run / "config.json").write_text(json.dumps({"model": config}))
    encoders = encoders_of(str(run))
    assert [encoder.num_frames for encoder in encoders.values()] == config["num_frames"]
    assert encoders["siglip"].recipe.size == 224


def test_a_published_model_needs_only_its_configuration(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model": {}}')
    asked = []

    def download(self, repo, name):
        asked.append((repo, name))
        return tmp_path / "config.json"

    monkeypatch.setattr(Sources, "download", download)
    for model in ("merv-full", "MERV Full"):
        assert {name: encoder.num_frames for name, encoder in encoders_of(model).items()} == TINY
    assert asked == [("tyleryzhu/merv", "merv-full/config.json")] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.mp4"], "error: nowhere.mp4: does not exist"),
        (["TEXT"], "is not a video that can be read here"),
        (["CLIP", "--sheet", "a.jpg"], "error: --sheet must be a .png file, got a.jpg"),
        (["CLIP", "--sheet", "nowhere/a.png"], "nowhere/a.png"),
        (["CLIP", "--decoder", "decord"], "decoder must be one of auto, pyav, dali"),
        (["CLIP", "--device", "cuda:7"], "error: --device cuda:7: torch sees "),
        (["CLIP", "--start", "99"], "lie outside the video"),
        (["CLIP", "--model", "merv-huge"], "error: --model must be a directory, a hub id or one of merv-tiny, "),
        (["CLIP", "--fps", "3"], "fps must be None unless path is a folder"),
    ],
)
def test_an_error_is_one_line(monkeypatch, capsys, tmp_path, arguments, words):
    (tmp_path / "text.mp4").write_text("no video")
    stands_for = {"CLIP": str(sample_clip()), "TEXT": str(tmp_path / "text.mp4")}
    monkeypatch.setattr(sys, "argv", ["merv-fast", "probe", *[stands_for.get(a, a) for a in arguments]])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert stop.value.code == 1
    assert captured.out == ""
    assert words in captured.err
    assert len(captured.err.splitlines()) == 1


def test_dali_that_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setattr(merv_fast.video.choice, "has_dali", lambda: False)
    monkeypatch.setattr(sys, "argv", ["merv-fast", "probe", str(sample_clip()), "--decoder", "dali"])
    with pytest.raises(SystemExit):
        main()
    assert "pip install 'merv-fast[dali]'" in capsys.readouterr().err


def test_help():
    done = runner.invoke(app, ["probe", "--help"])
    assert done.exit_code == 0
    assert "--sheet" in done.stdout


def test_damaged_video_is_reported(tmp_path, caplog):
    path = write_clip(tmp_path / "cut.mkv", count=60)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 0 < report(path)["frames"] < 60
    assert "frames are missing" in caplog.text
