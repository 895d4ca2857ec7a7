"""Clips as files, and what is learned from them as arrays: frames, what is where in them, and their scenes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import av
import numpy as np
import torch
from numpy.typing import NDArray

from merv_fast.ops import resample_frames
from merv_fast.training.tiny.drawing import draw, visible
from merv_fast.training.tiny.scenes import CAMERAS, COLOURS, DIRECTIONS, SHAPES, Scene, draw_scene
from merv_fast.video import load_frames, sample_indices

if TYPE_CHECKING:
    from av.video.stream import VideoStream

__all__ = ["FRAMES", "GRID", "SIDE", "SLOTS", "Clips", "Truth", "clip_of", "make_clips", "write_clip"]

FRAMES, SLOTS, SIDE, GRID = 16, 8, 64, 8
"""Frames of a clip that are looked at, temporal slots, pixels of a frame's side and patches along it."""

COVERED = 12
"""Pixels of a patch, of 64, from which on it counts as a part of the thing that covers most of it."""

CODECS = {
    "h264": ("libx264", {"crf": "21", "preset": "veryfast", "x264-params": "mbtree=0"}),
    "vp9": ("libvpx-vp9", {"crf": "28", "b": "0", "deadline": "realtime", "cpu-used": "8"}),
}
"""With its macroblock tree x264 encodes the same zoom differently each time."""


class Truth(NamedTuple):
    """What there is at each patch, int8 [slots, grid, grid] each; 0 stands for the background.

    ``thing`` is its number; it, ``colour``, ``shape`` and, of arrows, ``points`` count from 1; ``moves``: 1 at rest,
    from 2 on directions; ``speed``: 1 slow, 2 fast; ``appears`` and ``vanishes``: the first slot with the thing and
    that after the last, from 1; ``centre``: whether the thing's centre is in the patch; ``x`` and ``y``: of that
    centre, in hundredths.
    """

    thing: NDArray[np.int8]
    colour: NDArray[np.int8]
    shape: NDArray[np.int8]
    points: NDArray[np.int8]
    moves: NDArray[np.int8]
    speed: NDArray[np.int8]
    appears: NDArray[np.int8]
    vanishes: NDArray[np.int8]
    centre: NDArray[np.int8]
    x: NDArray[np.int8]
    y: NDArray[np.int8]


@dataclass(frozen=True)
class Clips:
    """Many clips.

    Args:
        frames: uint8 [N, frames, side, side, 3], as the encoders see them before they are normalised.
        truth: [N, fields of `Truth`, slots, grid, grid].
        front: uint8 [N, slots, side, side], the number of the thing in front at each pixel, or 0.
        camera: int64 [N], places in ``CAMERAS``.
        scenes: N of them.
    """

    frames: NDArray[np.uint8]
    truth: NDArray[np.int8]
    front: NDArray[np.uint8]
    camera: NDArray[np.int64]
    scenes: list[Scene]

    @classmethod
    def read(cls, folder: Path, seed: int, training: bool = True) -> Clips:
        """What `make_clips` left in ``folder``; scenes follow from the seed."""
        frames, truth, front = (np.load(folder / f"{name}.npy", mmap_mode="c") for name in ("frames", "truth", "front"))
        scenes = [draw_scene(np.random.default_rng([seed, index]), training) for index in range(len(truth))]
        return cls(frames, truth, front, np.array([CAMERAS.index(scene.camera) for scene in scenes]), scenes)


def write_clip(scene: Scene, path: Path) -> None:
    """Draw and encode a scene: H.264 in MP4 or VP9 in WebM, by the path's suffix."""
    name, options = CODECS["vp9" if path.suffix == ".webm" else "h264"]
    with av.open(str(path), "w") as file:
        stream = cast("VideoStream", file.add_stream(name, rate=scene.rate, options=options))
        stream.height, stream.width = scene.size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in draw(scene):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))


def clip_of(seed: Sequence[int], training: bool, folder: Path, theme: str | None = None) -> tuple[Scene, Path]:
    """The scene of a seed, and its clip in ``folder``."""
    scene = draw_scene(np.random.default_rng(list(seed)), training, theme)
    path = folder / f"{'-'.join(map(str, seed))}.{'webm' if scene.codec == 'vp9' else 'mp4'}"
    write_clip(scene, path)
    return scene, path


def make_clips(seed: int, count: int, folder: Path, training: bool = True, processes: int = 2) -> Clips:
    """Write ``count`` clips and read them again the way the model does.

    Args:
        seed: clips of different seeds have nothing to do with each other.
        count: of clips.
        folder: for the files and the arrays, made if need be.
        training: as for `draw_scene`.
        processes: that draw, encode and decode.
    """
    from rich.progress import track

    folder.mkdir(parents=True, exist_ok=True)
    shapes = {
        "frames": (np.uint8, (FRAMES, SIDE, SIDE, 3)),
        "truth": (np.int8, (len(Truth._fields), SLOTS, GRID, GRID)),
        "front": (np.uint8, (SLOTS, SIDE, SIDE)),
    }
    arrays = [
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(count, *shape))
        for name, (dtype, shape) in shapes.items()
    ]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        done = pool.map(one_clip, ((seed, index, training, folder) for index in range(count)), chunksize=16)
        for index, made in enumerate(track(done, "clips", total=count)):
            for array, each in zip(arrays, made, strict=True):
                array[index] = each
    return Clips.read(folder, seed, training)


def one_clip(task: tuple[int, int, bool, Path]) -> tuple[NDArray[Any], ...]:
    """One clip, in a process of its own."""
    torch.set_num_threads(1)
    seed, index, training, folder = task
    scene, path = clip_of((seed, index), training, folder)
    frames = load_frames(path, FRAMES, decoder="pyav")
    truth, front = truth_of(scene)
    return resample_frames(frames, (SIDE, SIDE)).numpy(), np.stack(truth), front


def truth_of(scene: Scene) -> tuple[Truth, NDArray[np.uint8]]:
    """What is where at the first frame of each slot, patch by patch, and which thing is in front at each pixel."""
    indices = sample_indices(scene.frames, scene.rate, FRAMES)[:: FRAMES // SLOTS]
    times = [scene.times()[index] for index in indices]
    front = visible(scene, times, SIDE)
    patches = front.reshape(SLOTS, GRID, SIDE // GRID, GRID, SIDE // GRID).swapaxes(2, 3).reshape(SLOTS, GRID, GRID, -1)
    cover = np.stack([(patches == number).sum(-1) for number in range(1, 1 + max(1, len(scene.things)))])
    number = np.where(cover.max(0) >= COVERED, cover.argmax(0) + 1, 0)
    table = np.zeros((len(Truth._fields), SLOTS, len(scene.things) + 1), np.int8)
    for place, thing in enumerate(scene.things, 1):
        there = [thing.seen(time) for time in times]
        for slot, time in enumerate(times):
            x, y, _ = scene.on_screen(thing, time)
            table[:, slot, place] = (
                place,
                list(COLOURS).index(thing.colour) + 1,
                SHAPES.index(thing.shape) + 1,
                list(DIRECTIONS).index(thing.pointing(time)) + 1 if thing.shape == "arrow" else 0,
                list(DIRECTIONS).index(thing.direction) + 2 if thing.direction else 1,
                {None: 0, "slow": 1, "fast": 2}[thing.speed],
                there.index(True) + 1 if True in there else 0,
                SLOTS - there[::-1].index(True) + 1 if True in there else 0,
                0,
                np.clip(round(100 * x), 0, 100),
                np.clip(round(100 * y), 0, 100),
            )
    truth = np.take_along_axis(table, number.reshape(1, SLOTS, -1), 2).reshape(-1, SLOTS, GRID, GRID)
    for slot, row, column in zip(*number.nonzero(), strict=True):
        x, y = truth[-2:, slot, row, column] * (GRID / 100)
        truth[Truth._fields.index("centre"), slot, row, column] = (int(min(y, GRID - 1)), int(min(x, GRID - 1))) == (
            row,
            column,
        )
    return Truth(*truth), front


def batches(count: int, size: int, epochs: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Places of random batches, each clip at most once an epoch."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(count)
        yield from (order[start : start + size] for start in range(0, count - size + 1, size))
