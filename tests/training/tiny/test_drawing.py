"""Pictures: what is drawn is where the scene says, looks like its name, and the background is neither."""

import dataclasses

import numpy as np
import pytest

from merv_fast.training.tiny.drawing import draw, visible
from merv_fast.training.tiny.scenes import CAMERAS, COLOURS, DIRECTIONS, SHAPES, Scene, Thing

PLAIN = Scene("motion", (), "static", 0.3, (96, 128), 10, 4, "h264", 3)


def thing(**given):
    given = {"colour": "red", "shape": "circle", "start": (0.3, 0.6), "radius": 0.12, "tint": (0, 0, 0)} | given
    return Thing(**given)


def with_things(*things, **given):
    return dataclasses.replace(PLAIN, things=things, **given)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_thing_has_its_colour_where_it_is(colour, shape):
    there, without = draw(with_things(thing(colour=colour, shape=shape))), draw(PLAIN)
    row, column = round(0.6 * 96), round(0.3 * 128)
    assert (there[:, row, column] == COLOURS[colour]).all()
    changed = (there != without).any(-1)
    rows, columns = np.nonzero(changed[0])
    assert abs(rows.mean() - row) < 3
    assert abs(columns.mean() - column) < 3
    assert 0.12 * 96 - 3 < np.ptp(rows) / 2 < 0.12 * 96 + 2


def test_shapes_differ_and_so_do_arrows():
    seen = {shape: visible(with_things(thing(shape=shape)), [0.0], 128)[0] for shape in SHAPES}
    seen |= {way: visible(with_things(thing(shape="arrow", points=(way, way))), [0.0], 128)[0] for way in DIRECTIONS}
    names = [name for name in seen if name != "arrow"]
    for index, one in enumerate(names):
        assert all((seen[one] != seen[other]).mean() > 0.05 * (seen[one] > 0).mean() for other in names[:index])


@pytest.mark.parametrize(("way", "step"), DIRECTIONS.items())
def test_an_arrow_is_pointed_where_it_points(way, step):
    seen = visible(with_things(thing(shape="arrow", start=(0.5, 0.5), points=(way, way))), [0.0], 128)[0]
    rows, columns = np.nonzero(seen)
    along = (columns - 63.5) * step[0] * 96 / 128 + (rows - 63.5) * step[1]
    # The head is wide: more of an arrow lies ahead of its middle than behind.
    wide = [np.ptp((rows if step[0] else columns)[part]) for part in (along > 1, along < -5)]
    assert wide[0] > 1.5 * wide[1]


def test_later_things_are_in_front_and_absent_ones_nowhere():
    pair = (thing(), thing(colour="blue", shape="square", vanishes=0.5))
    seen = visible(with_things(*pair), [0.0, 0.6], 64)
    assert set(np.unique(seen[0])) >= {0, 2}
    assert set(np.unique(seen[1])) == {0, 1}
    frames = draw(with_things(*pair))
    row, column = round(0.6 * 96), round(0.3 * 128)
    assert (frames[0, row, column] == COLOURS["blue"]).all()
    assert (frames[3, row, column] == COLOURS["red"]).all()


@pytest.mark.parametrize("camera", CAMERAS)
def test_the_background_moves_with_the_camera(camera):
    frames = draw(with_things(camera=camera)).astype(float)
    moved = np.abs(frames[0] - frames[-1]).mean()
    assert moved == 0 if camera == "static" else moved > 3
    if camera.startswith("pans"):
        # The picture of a camera that pans to the right moves to the left, by the share of the width that it travels.
        step = round(0.3 * 128) * (1 if camera == "pans right" else -1)
        inside = slice(45, 80)
        ahead = np.roll(frames[0], -step, axis=1)
        assert np.abs(ahead - frames[-1])[:, inside].mean() < moved / 3


def test_backgrounds_are_duller_than_things():
    for seed in range(20):
        frames = draw(dataclasses.replace(PLAIN, seed=seed, frames=1 + 1)).astype(float)
        assert (frames.max(-1) - frames.min(-1)).mean() < 40
        assert frames.std() > 8
