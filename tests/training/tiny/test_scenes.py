"""Scenes: reproducible, within the picture, and without what is kept from training."""

from itertools import combinations, pairwise
from math import dist, isfinite

import numpy as np
import pytest

from merv_fast.training.tiny.scenes import CAMERAS, COLOURS, DIRECTIONS, SHAPES, THEMES, draw_scene, held_out

SEEDS = range(300)


def scene(index, training=True, theme=None):
    return draw_scene(np.random.default_rng([5, index]), training, theme)


def test_a_seed_is_a_scene():
    assert [scene(index) for index in range(20)] == [scene(index) for index in range(20)]
    assert len({scene(index) for index in range(20)}) == 20


def test_every_theme_and_camera_occurs():
    assert {scene(index).theme for index in SEEDS} == set(THEMES)
    assert {scene(index, theme="camera").camera for index in SEEDS} == set(CAMERAS)


def test_each_pair_of_colour_and_shape_is_kept_from_one_direction_at_most():
    kept = {(c, s): [d for d in DIRECTIONS if held_out(c, s, d)] for c in COLOURS for s in SHAPES}
    assert max(map(len, kept.values())) == 1
    assert 0.15 < sum(map(len, kept.values())) / (len(kept) * len(DIRECTIONS)) < 0.25


@pytest.mark.parametrize("training", [True, False])
def test_what_is_held_out_is_never_trained_on_and_often_tested(training):
    scenes = [scene(index, training, "motion") for index in SEEDS]
    movers = [[thing for thing in each.things if thing.direction] for each in scenes]
    new = [any(held_out(thing.colour, thing.shape, thing.direction) for thing in things) for things in movers if things]
    assert not any(new) if training else np.mean(new) > 0.4


@pytest.mark.parametrize("theme", THEMES)
def test_things_stay_in_the_picture_and_start_and_end_apart(theme):
    for index in SEEDS:
        each = scene(index, False, theme)
        for time in (0.0, 0.5, 1.0):
            for thing in each.things:
                x, y, _ = each.on_screen(thing, time)
                assert 0.05 < x < 0.95
                assert 0.05 < y < 0.95
        for one, other in combinations(each.things, 2):
            assert min(dist(one.place(time), other.place(time)) for time in (0.0, 1.0)) > 0.2
        names = [thing.name for thing in each.things]
        assert theme == "counting" or len(set(names)) == len(names)


def test_events_are_apart_by_more_than_the_frames_that_are_looked_at():
    for index in SEEDS:
        things = scene(index, theme="events").things
        assert all(not (thing.appears > 0 and isfinite(thing.vanishes)) for thing in things)
        moments = [moment for thing in things for moment in (thing.appears, thing.vanishes) if 0 < moment < 2]
        assert len(moments) >= 2
        assert min(moments) > 0.1
        assert max(moments) < 0.95
        assert min(b - a for a, b in pairwise(sorted(moments))) > 0.1


@pytest.mark.parametrize(
    ("camera", "expected"),
    [("pans left", (1, 0)), ("pans right", (-1, 0)), ("zooms in", (0, 1)), ("zooms out", (0, -1)), ("static", (0, 0))],
)
def test_what_the_camera_does_shows_on_screen(camera, expected):
    each = next(s for s in (scene(index, theme="camera") for index in SEEDS) if s.camera == camera)
    (before, after) = (each.on_screen(each.things[0], time) for time in (0.0, 1.0))
    # Things move against a pan, and grow as the camera comes closer.
    shift, growth = np.sign(after[0] - before[0]), np.sign(after[2] - before[2])
    assert (shift if camera.startswith("pans") else 0, growth) == expected
