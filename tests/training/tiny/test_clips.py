"""Clips: files that show their scene, and arrays that say what is where."""

import numpy as np
import pytest

from merv_fast.training.tiny.clips import FRAMES, GRID, SIDE, SLOTS, Clips, Truth, clip_of, make_clips, truth_of
from merv_fast.training.tiny.drawing import draw
from merv_fast.training.tiny.scenes import COLOURS, DIRECTIONS, SHAPES, draw_scene
from merv_fast.video import open_video


@pytest.mark.parametrize("index", range(12))
def test_a_file_shows_its_scene(index, tmp_path):
    scene, path = clip_of((4, index), True, tmp_path)
    video = open_video(path)
    assert (video.size, len(video), video.fps) == (scene.size, scene.frames, scene.rate)
    assert path.suffix == {"vp9": ".webm", "h264": ".mp4"}[scene.codec]
    decoded = video.frames_at(range(scene.frames)).numpy().astype(float)
    assert np.abs(decoded - draw(scene)).mean() < 6
    assert path.stat().st_size < 60_000


def test_codecs_sizes_and_rates_vary():
    scenes = [draw_scene(np.random.default_rng([4, index]), True) for index in range(60)]
    assert {scene.codec for scene in scenes} == {"h264", "vp9"}
    assert len({scene.size for scene in scenes}) > 3
    assert len({scene.rate for scene in scenes}) > 3


def test_the_truth_is_where_things_are():
    for index in range(40):
        scene = draw_scene(np.random.default_rng([4, index]), True)
        truth, front = truth_of(scene)
        assert front.shape == (SLOTS, SIDE, SIDE)
        assert truth.thing.shape == (SLOTS, GRID, GRID)
        size = SIDE // GRID
        for slot, row, column in zip(*truth.thing.nonzero(), strict=True):
            thing = scene.things[truth.thing[slot, row, column] - 1]
            patch = front[slot, row * size : (row + 1) * size, column * size : (column + 1) * size]
            assert np.bincount(patch.ravel(), minlength=9)[1:].argmax() + 1 == truth.thing[slot, row, column]
            here = {name: int(value[slot, row, column]) for name, value in truth._asdict().items()}
            assert (here["colour"], here["shape"]) == (
                list(COLOURS).index(thing.colour) + 1,
                SHAPES.index(thing.shape) + 1,
            )
            assert here["moves"] == (list(DIRECTIONS).index(thing.direction) + 2 if thing.direction else 1)
            assert here["appears"] <= slot + 1 < here["vanishes"]
            assert (thing.appears > 0) == (here["appears"] > 1)
            assert (thing.vanishes < 1) == (here["vanishes"] <= SLOTS)
            if here["centre"]:
                assert (int(here["y"] / 100 * GRID), int(here["x"] / 100 * GRID)) == (row, column)


def test_making_and_reading(tmp_path):
    made = make_clips(6, 5, tmp_path, processes=1)
    again = Clips.read(tmp_path, 6)
    assert made.frames.shape == (5, FRAMES, SIDE, SIDE, 3)
    assert made.truth.shape[1] == len(Truth._fields)
    assert all(np.array_equal(getattr(made, name), getattr(again, name)) for name in ("frames", "truth", "front"))
    assert made.scenes == again.scenes
    assert len(list(tmp_path.glob("6-*.*"))) == 5
    for index, scene in enumerate(made.scenes):
        truth, front = truth_of(scene)
        assert np.array_equal(made.truth[index], np.stack(truth))
        assert np.array_equal(made.front[index], front)


def test_files_are_the_same_each_time(tmp_path):
    """Clips that zoom are those that encoders do not repeat by themselves."""
    found = set()
    for time in range(6):
        folder = tmp_path / str(time)
        folder.mkdir()
        scene, clip = clip_of((5, 5), True, folder)
        found.add(clip.read_bytes())
    assert scene.camera == "zooms out"
    assert len(found) == 1
