import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from merv_fast.errors import VideoError
from merv_fast.video import VideoLoader, load_frames, sample_indices
from merv_fast.video.progress import tick
from tests.video.clips import write_clip

GOOD = [f"good-{place}" for place in range(8)]


def picture(path):
    """A quick stand-in for decoding; what it does hangs on the name."""
    if path.startswith("bad"):
        raise VideoError(path, "is bad")
    if path.startswith("wrong"):
        raise KeyError(path)
    if path.startswith("float"):
        return torch.zeros(1), [0]
    if path.startswith("hang"):
        time.sleep(1000)
    if path.startswith("slow"):
        for _ in range(12):
            time.sleep(0.25)
            tick()
    if path.startswith("exit"):
        os._exit(3)
    if path.startswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.full((2, 3, 4, 3), len(path), dtype=torch.uint8), [0, 7]


def note(path, folder):
    """As `picture`, with a file for each path that was begun."""
    Path(folder, path).touch()
    return picture(path)


def children():
    """Workers of this process that are alive."""
    return [process for process in multiprocessing.active_children() if "merv_fast" in process.name]


def mapped():
    """Nameless memory that this process holds."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:merv_fast" in line]


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def errors(items):
    return {item.path: item.error.reason for item in items if item.error}


@pytest.mark.parametrize("workers", [0, 2])
def test_items_in_the_order_of_the_paths(workers, tmp_path):
    paths = [write_clip(tmp_path / f"{count}.mp4", count=count) for count in (30, 12, 20, 25)]
    paths[1:1] = [tmp_path / "none.mp4"]
    (tmp_path / "noise.mp4").write_bytes(b"noise" * 99)
    paths.append(tmp_path / "noise.mp4")
    with VideoLoader(paths, 5, workers=workers, clip_start_sec=0.08) as loader:
        assert len(loader) == 6
        for _ in range(2):
            items = list(loader)
            assert [item.path for item in items] == list(map(str, paths))
            assert errors(items).keys() == {str(paths[1]), str(paths[5])}
            assert items[1].error.reason == "does not exist"
            assert items[1].frames is None
            for place, count in ((0, 30), (2, 12), (3, 20), (4, 25)):
                assert torch.equal(items[place].frames, load_frames(paths[place], 5, clip_start_sec=0.08))
                assert items[place].indices == sample_indices(count, 25.0, 5, 0.08)
    assert not children()


def test_frames_outlive_the_workers_and_then_go():
    with VideoLoader(GOOD, decode=picture) as loader:
        items = list(loader)
    assert len(mapped()) == 8
    kept = items[3].frames.view(-1)[1:]
    kept += 1
    del items
    gc.collect()
    assert len(mapped()) == 1
    assert kept.eq(7).all()
    del kept
    assert not mapped()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_bad_file_is_an_item(workers):
    paths = ["good-0", "bad-1", "wrong-2", "float-3", "good-4"]
    items = list(VideoLoader(paths, workers=workers, decode=picture))
    assert [item.path for item in items] == paths
    found = errors(items)
    assert found["bad-1"] == "is bad"
    assert found["wrong-2"] == "cannot be decoded (KeyError: 'wrong-2')"
    if workers:
        assert (
            found["float-3"]
            == "cannot be decoded (TypeError: frames must be uint8 and not empty, got torch.float32 (1,))"
        )
    assert items[4].frames.shape == (2, 3, 4, 3)


def test_a_worker_that_dies_is_replaced():
    paths = ["good-0", "exit-1", "killed-2", "good-3", "exit-4", "good-5"]
    with VideoLoader(paths, workers=2, decode=picture) as loader:
        items = list(loader)
    assert [item.path for item in items] == paths
    assert errors(items) == {
        "exit-1": "ended the process that decoded it (exit code 3)",
        "killed-2": "ended the process that decoded it (SIGKILL)",
        "exit-4": "ended the process that decoded it (exit code 3)",
    }
    assert not children()


def test_a_decoder_that_hangs_is_given_up_and_one_that_is_slow_is_not():
    paths = ["hang-0", "slow-1", "good-2"]
    began = time.monotonic()
    with VideoLoader(paths, workers=2, timeout=1.0, decode=picture) as loader:
        items = list(loader)
        assert errors(items) == {"hang-0": "was given up: decoding made no progress for 1 s"}
        assert items[1].frames is not None
    assert time.monotonic() - began < 60
    assert not children()


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_than_so_many_ahead(ahead, tmp_path):
    decode = partial(note, folder=str(tmp_path))
    with VideoLoader(GOOD, workers=2, ahead=ahead, decode=decode) as loader:
        for place, _ in enumerate(loader):
            expected = set(GOOD[: place + 1 + ahead])
            deadline = time.monotonic() + 30
            # It does decode ahead of a caller that is busy, and then no further.
            while set(os.listdir(tmp_path)) != expected and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
            assert set(os.listdir(tmp_path)) == expected


def interrupt(loader):
    for _ in loader:
        raise KeyboardInterrupt


def test_ending_early_stops_the_workers():
    before = descriptors()
    loader = VideoLoader(["good-0", *["hang"] * 9], decode=picture)
    for _ in loader:
        assert children()
        break
    gc.collect()
    assert not children()

    with pytest.raises(KeyboardInterrupt):
        interrupt(loader)
    gc.collect()
    assert not children()
    items = iter(loader)
    next(items)
    assert children()
    loader.close()
    assert not children()
    with pytest.raises(RuntimeError, match="VideoLoader: the loader must not be closed while it is read"):
        next(items)
    with pytest.raises(RuntimeError, match="VideoLoader: the loader must not be closed"):
        iter(loader)
    del items
    loader = VideoLoader(["good-0", *["hang"] * 9], decode=picture)
    items = iter(loader)
    next(items)
    del loader, items
    gc.collect()
    assert not children()
    assert descriptors() <= before + 4


def test_workers_that_cannot_start_are_an_error():
    with pytest.raises(RuntimeError, match=r"VideoLoader: .*lambda"):
        list(VideoLoader(GOOD, decode=lambda path: None))
    with pytest.raises(RuntimeError, match=r"VideoLoader: a worker process did not start \(exit code 1\)"):
        list(VideoLoader(GOOD, decode=Unloadable()))
    assert not children()


class Unloadable:
    """Pickles, and fails when it is read back."""

    def __call__(self, path):
        raise AssertionError

    def __reduce__(self):
        return int, ("none",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": -1}, "VideoLoader: workers must be at least 0, got -1"),
        ({"count": 0}, "VideoLoader: count must be at least 1, got 0"),
        ({"ahead": 0}, "VideoLoader: ahead must be at least 1, got 0"),
        ({"timeout": 0}, "VideoLoader: timeout must be positive, got 0"),
        ({"decode": picture, "strict": True}, "VideoLoader: strict must be left out beside decode"),
        ({"clip_start": 1.0}, "VideoLoader: arguments must be among clip_start_sec, .*, got clip_start"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        VideoLoader(GOOD, **arguments)


def test_no_paths():
    assert list(VideoLoader([])) == []
    assert list(VideoLoader([], progress=True)) == []


def test_progress_bar(capfd):
    items = list(VideoLoader([*GOOD, "bad"], workers=0, decode=picture, progress=True))
    assert len(items) == 9
    out, err = capfd.readouterr()
    assert "9/9" in err
    assert "1 failed" in err
    assert not out


SCRIPT = """
import sys, time
from merv_fast.video import VideoLoader
from tests.video.test_loader import picture

if __name__ == "__main__":
    loader = VideoLoader(["good-0", "good-1", *["hang"] * 9], decode=picture)
    for item in loader:
        print(item.path, flush=True)
        if item.path == "good-1" and sys.argv[1] == "exit":
            saved = iter(loader)
            next(saved)
            sys.exit(5)
"""


def group(leader):
    """Processes of a group, from /proc: (pid, state)."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if entry.name.isdigit() and int(fields[2]) == leader:
                found.append((int(entry.name), fields[0]))
    return found


@pytest.mark.parametrize("way", ["interrupt", "exit", "kill"])
def test_nothing_stays_behind(way, tmp_path):
    """Ctrl-C, an exit amid one loop with another left open, and the death of the caller."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, str(script), way], start_new_session=True, env=environment, **pipes)
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["good-0\n", "good-1\n"]
        if way == "interrupt":
            assert len(group(process.pid)) >= 3
            # The terminal sends it to the whole group.
            os.killpg(process.pid, signal.SIGINT)
        elif way == "kill":
            process.kill()
        _, err = process.communicate(timeout=60)
        assert process.returncode == {"interrupt": -signal.SIGINT, "exit": 5, "kill": -signal.SIGKILL}[way]
        assert err.count("Traceback") == (way == "interrupt")
        assert "leaked" not in err
        deadline = time.monotonic() + 20
        while group(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not group(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
