"""Read mutants in a process of their own, which may crash or hang.

``python -m tests.video.fuzzing NUMBER [STOP]`` does so again with one, or with several, and keeps those that go wrong.
"""

import contextlib
import ctypes
import faulthandler
import gc
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

import merv_fast.video.pyav
from merv_fast.errors import VideoError
from merv_fast.video import VideoLimits, load_frames, open_video, seeking
from merv_fast.video.lanes import MOST_LANES, MOST_PIXELS
from tests.video.mutants import make_mutant, read_seeds, write_seeds

ROOT = Path(__file__).parents[2]

SECONDS = 5
"""Of processor time that a mutant may take; it is opened twice and read three times."""

PATIENCE = 200
"""Seconds by the clock, for one that waits for ever. A busy machine may hold a process up for long."""

DEATHS = 10
"""Of processes, after which the rest is left out."""

THREADS = 4

DEFAULT = VideoLimits(max_decode_seconds=SECONDS / 5 / THREADS)
"""The default limits, but for time: two openings and three readings with all threads last no longer than `SECONDS`."""

SMALL = VideoLimits(max_pixels=240 * 320, max_frames=128, max_bytes=2**18)
"""Just room for the bundled clip."""

DEFAULT_EVERY = 7
"""One mutant in so many is read under the default limits; every other seven are sought in at every chance."""

READ_BYTES = 2**26
"""Of frames that are asked for at once, unless a single one has more."""

UNWRITTEN = 0xA5
"""What new frames are filled with."""


def limits_of(number: int) -> VideoLimits:
    return DEFAULT if number % DEFAULT_EVERY == DEFAULT_EVERY - 1 else SMALL


def memory_bound(limits: VideoLimits) -> int:
    """Bytes that reading a mutant may take.

    Each decoder holds up to 16 references and a picture for each thread, mostly in 4:2:0 and 8 bits; several decoders
    work side by side up to `MOST_PIXELS`. Two tensors of frames are alive at a time.
    """
    pixels = min(limits.max_pixels * MOST_LANES, max(limits.max_pixels, MOST_PIXELS))
    frame = 3 * limits.max_pixels
    return 3 * pixels * (16 + THREADS) // 2 + 2 * max(frame, min(frame * limits.max_frames, READ_BYTES))


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant.

    Attributes:
        number: Of the mutant.
        source: The clip it was made from.
        kind: Of the mutation.
        frames: That it gave.
        refused: The reason of its `VideoError`, or None.
        wrong: What must not happen, or None.
        seconds: Of processor time.
        peak: Bytes of memory at most while it was read, over those before.
        kept: Bytes of memory, without those that mirror files, after all was let go.
        warnings: That were logged.
    """

    number: int
    source: str
    kind: str
    frames: int = 0
    refused: str | None = None
    wrong: str | None = None
    seconds: float = 0.0
    peak: int = 0
    kept: int = 0
    warnings: int = 0

    def __str__(self) -> str:
        fate = self.wrong or (f"refused, {self.refused}" if self.refused else f"{self.frames} frames")
        effort = f"{self.seconds:.2f} s, {self.peak / 1e6:.0f} MB"
        return f"{self.number} ({self.kind}, {self.source}; {effort}): {fate}"


def run(numbers: range, folder: Path, reader: str = "tests.video.fuzzing:read") -> Iterator[Outcome]:
    """Read mutants of the seeds in ``folder``, in as many processes as it takes; files that go wrong stay there."""
    first, deaths = numbers.start, 0
    while first < numbers.stop and deaths < DEATHS:
        call = f"from tests.video.fuzzing import work; work({first}, {numbers.stop}, {str(folder)!r}, {reader!r})"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with open(folder / "said", "w+b") as said:
            child = subprocess.Popen(
                [sys.executable, "-c", call], env=environment, stdout=subprocess.PIPE, stderr=said, text=True
            )
        try:
            for line in child.stdout:
                outcome = Outcome(**json.loads(line))
                first = outcome.number + 1
                yield outcome
            child.wait()
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        if child.returncode:
            deaths += 1
            words = f"{fate(child.returncode)}\n{(folder / 'said').read_text(errors='replace')[-4000:]}"
            if not list(folder.glob(f"{first}.*")):
                raise RuntimeError(f"the process that reads mutants was not reading one: {words}")
            mutant = make_mutant(first, read_seeds(folder))
            yield Outcome(first, mutant.source, mutant.kind, wrong=words)
            first += 1


def fate(code: int) -> str:
    if code == -signal.SIGPROF:
        return f"hung: took over {SECONDS} s of processor time"
    if code == -signal.SIGALRM:
        return f"hung: took over {PATIENCE} s"
    return f"ended the process ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


def work(first: int, stop: int, folder: str, reader: str) -> None:
    """Read mutants and print their outcomes; the main function of the process."""
    # Whatever else is printed counts as noise.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    log = Log()
    poison_memory()
    # The same on every machine.
    merv_fast.video.pyav.decoding_threads = lambda: THREADS
    module, _, name = reader.partition(":")
    function = getattr(import_module(module), name)
    seeds = read_seeds(Path(folder))
    # What decoders set up once is no leak.
    for source in seeds:
        read(Path(folder, source), SMALL)
    trim()
    gc.freeze()
    # What takes far too much must not take the machine with it.
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + 3 * memory_bound(DEFAULT),) * 2)
    for number in range(first, stop):
        mutant = make_mutant(number, seeds)
        path = Path(folder, f"{number}{mutant.suffix}")
        path.write_bytes(mutant.data)
        log.count = 0
        outcome = watch(function, path, Outcome(number, mutant.source, mutant.kind))
        if outcome.wrong is None:
            path.unlink()
        trim()
        outcome = replace(outcome, kept=status("RssAnon"), warnings=log.count)
        print(json.dumps(asdict(outcome)), file=out, flush=True)


def watch(function: Callable[[Path, VideoLimits], int], path: Path, outcome: Outcome) -> Outcome:
    """``outcome`` with what comes of reading ``path``; what takes too long ends the process."""
    # Forget the peak of what came before.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before, said, began = status("VmRSS"), os.fstat(2).st_size, time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    frames, refused, wrong = 0, None, None
    eager = outcome.number // DEFAULT_EVERY % 2
    seeking.RESTART, seeking.READ_THROUGH, seeking.STRETCH = (0, 0, 1) if eager else (8, 64, 32)
    try:
        frames = function(path, limits_of(outcome.number))
    except VideoError as error:
        refused = error.reason
        wrong = None if error.path == str(path) else f"the error names {error.path}"
    except Exception:
        wrong = traceback.format_exc()
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if os.fstat(2).st_size > said:
        wrong = f"{wrong or ''}wrote to stderr: {os.pread(2, 1000, said)}"
    seconds, peak = time.process_time() - began, status("VmHWM") - before
    return replace(outcome, frames=frames, refused=refused, wrong=wrong, seconds=seconds, peak=peak)


def read(path: Path, limits: VideoLimits) -> int:
    """Read few frames, many, and a sample, and look at them; their number."""
    video = open_video(path, limits=limits)
    count, (height, width) = len(video), video.size
    assert 1 <= count <= limits.max_frames, f"{count} frames"
    assert 1 <= height * width <= limits.max_pixels, f"frames of {width} x {height}"
    room = max(READ_BYTES // (3 * height * width), 1)
    some = sorted({0, count // 3, count - 1})[:room]
    for numbers in (some, range(min(count, room))):
        check_frames(video.frames_at(numbers), (len(numbers), height, width, 3))
    check_frames(load_frames(path, len(some), limits=limits), (len(some), height, width, 3))
    return count


def check_frames(frames: torch.Tensor, shape: tuple[int, ...]) -> None:
    assert frames.dtype == torch.uint8, f"{frames.dtype}"
    assert frames.shape == shape, f"{tuple(frames.shape)}, not {shape}"
    unwritten = [place for place, frame in enumerate(frames) if frame.eq(UNWRITTEN).all()]
    assert not unwritten, f"frames {unwritten} were not written"


def poison_memory() -> None:
    """Fill what is new, so that a frame that is not written shows."""
    tensor, array = torch.empty, np.empty

    def filled(*arguments, **more):
        out = array(*arguments, **more)
        if out.dtype == np.uint8:
            out.fill(UNWRITTEN)
        return out

    torch.empty = lambda *arguments, **more: tensor(*arguments, **more).fill_(UNWRITTEN)
    np.empty = filled


class Log(logging.Handler):
    """Counts what is logged and prints nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        logger = logging.getLogger("merv_fast")
        logger.addHandler(self)
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        record.getMessage()
        self.count += 1


def trim() -> None:
    """Give back what memory is free."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def status(name: str) -> int:
    """Bytes that the kernel counts for this process."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main(arguments: list[str]) -> None:
    first, stop = int(arguments[0]), int(arguments[-1]) + (len(arguments) == 1)
    folder = Path(tempfile.mkdtemp(prefix="merv_fast-mutants-"))
    write_seeds(folder)
    for outcome in run(range(first, stop), folder):
        print(outcome)
    print(f"files: {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
