"""Writers that are killed, and several at once."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from merv_fast.runtime.cache.disk import DiskTier
from tests.runtime.cache_writer import entry_of, key_of

ROOT = Path(__file__).parents[2]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_writers(how, folder, count):
    """Keys that writers reported."""
    command = [sys.executable, "-m", "tests.runtime.cache_writer", how, str(folder), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def read_back(folder, caplog):
    """Keys of the entries that are there; each must hold what its key says, and none may be damaged."""
    tier, found = DiskTier(folder, 2**30), set()
    for number in range(40):
        got = tier.get(key_of(number))
        if got is not None:
            expected = entry_of(key_of(number))
            assert got.keys() == expected.keys()
            assert all(torch.equal(got[name], expected[name]) for name in expected)
            found.add(key_of(number))
    assert caplog.text == ""
    return found


def test_killed_writers_lose_nothing(tmp_path, caplog):
    """At any moment: what was written before is there, nothing is half there, and what is left behind goes."""
    written = run_writers("killed", tmp_path, 30)
    assert len(written) > 10
    assert read_back(tmp_path, caplog) >= written
    leftovers = [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    assert leftovers
    for path in leftovers:
        os.utime(path, (0, 0))
    DiskTier(tmp_path, 2**30)
    assert not any(path.exists() for path in leftovers)


def test_a_writer_that_stops_halfway_leaves_the_old_entry(tmp_path, caplog, monkeypatch):
    """The moment that a kill seldom hits: half of the bytes are in the temporary file."""
    tier, key = DiskTier(tmp_path, 2**30), key_of(0)
    tier.put(key, entry_of(key))
    code = (
        "import os, signal, sys; from pathlib import Path; import merv_fast.runtime.cache.disk as disk;"
        "from tests.runtime.cache_writer import entry_of, key_of;"
        f"tier = disk.DiskTier({str(tmp_path)!r}, 2**30);"
        "os.fsync = lambda file: (os.ftruncate(file, 100), os.kill(os.getpid(), signal.SIGKILL));"
        "tier.put(key_of(0), {'tokens': entry_of(key_of(1))['tokens']})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL
    assert [path.stat().st_size for path in tmp_path.iterdir() if path.suffix == ".tmp"] == [100]
    assert read_back(tmp_path, caplog) == {key}


def test_several_processes_write_the_same_keys(tmp_path, caplog):
    """While one reads: it finds whole entries or none."""
    with ThreadPoolExecutor(1) as pool:
        writers = pool.submit(run_writers, "together", tmp_path, 20)
        while not writers.done():
            read_back(tmp_path, caplog)
        written = writers.result()
    assert read_back(tmp_path, caplog) == written
    assert len(list(tmp_path.iterdir())) == len(written)
