"""What each encoder is for: how much it weighs in clips of each theme, and the clips in which it weighs most."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from merv_fast.models.merv_model import MervModel
from merv_fast.ops import resample_frames
from merv_fast.training.tiny.clips import FRAMES, SIDE, SLOTS, clip_of
from merv_fast.training.tiny.scenes import THEMES, Scene
from merv_fast.video import load_frames
from merv_fast.video.sheet import Row, contact_sheet

__all__ = ["Weighed", "activating", "by_theme", "weigh"]


class Weighed(NamedTuple):
    """A clip, and the weight of each encoder in it."""

    scene: Scene
    clip: Path
    weights: dict[str, float]


def weigh(vidlm: MervModel, folder: Path, each: int, seed: int) -> list[Weighed]:
    """Make ``each`` clips of every theme in ``folder``, and let the model weigh its encoders in them."""
    from rich.progress import track

    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for index in track(range(each * len(THEMES)), "clips"):
        scene, clip = clip_of((seed, index), False, folder, theme=list(THEMES)[index % len(THEMES)])
        weights = vidlm.encode(clip).encoder_weights
        if weights is None:
            raise ValueError(f"weigh: the model must weigh its encoders, got the fusion {vidlm.config.feature_fusion}")
        found.append(Weighed(scene, clip, weights))
    return found


def by_theme(weighed: Sequence[Weighed]) -> dict[str, dict[str, float]]:
    """The mean weight of each encoder by theme."""
    found = {}
    for theme in THEMES:
        rows = [each.weights for each in weighed if each.scene.theme == theme]
        found[theme] = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return found


def activating(weighed: Sequence[Weighed], encoder: str, count: int = 6) -> Tensor:
    """A contact sheet of the clips in which an encoder weighs most: uint8 [H, W, 3]."""
    most = sorted(weighed, key=lambda each: -each.weights[encoder])[:count]
    places = range(0, FRAMES, FRAMES // SLOTS)
    rows = []
    for each in most:
        frames = resample_frames(load_frames(each.clip, FRAMES, decoder="pyav")[list(places)], (SIDE, SIDE))
        rows.append(Row(f"{each.weights[encoder]:.3f}", about(each.scene), frames, places))
    return contact_sheet(f"{encoder} weighs most", rows)


def about(scene: Scene) -> str:
    """A scene in a few words."""
    things = ", ".join(thing.name for thing in scene.things)
    return ": ".join(part for part in (scene.theme, scene.camera if scene.camera != "static" else "", things) if part)
