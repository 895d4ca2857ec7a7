"""bench/gpu_suite.sh with a stand-in for Python: which stages run, and what it makes of one that fails."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

ROOT = Path(__file__).parent.parent.parent
STAGES = [
    "tests-kernels",
    "build",
    "tests-csrc",
    "tests-runtime",
    "tests-inductor",
    "launches",
    "kernels",
    "attention",
    "memory",
    "precision",
    "bench",
]

STUB = """#!/usr/bin/env bash
case "$*" in
    "-c import torch"*) exit ${NO_GPU:-0} ;;
    *"bench.summary "*) exec "$REAL" "$@" ;;
    *"$FAILING"*) echo "FAILED here"; exit 3 ;;
esac
echo "$* with ${MERV_FAST_REQUIRE_CUDA:-nothing}"
"""


def run(tmp_path, failing="nothing of it", **more):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    environment = os.environ | {"PYTHON": str(stub), "REAL": sys.executable, "FAILING": failing} | more
    command = ["bash", str(ROOT / "bench" / "gpu_suite.sh"), "found"]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)


def stages(tmp_path):
    return {line.split()[0]: line.split()[1] for line in (tmp_path / "found" / "stages.txt").read_text().splitlines()}


def test_every_stage_and_a_short_summary_last(tmp_path):
    done = run(tmp_path)
    found = stages(tmp_path)
    # Without the tool there is nothing that these could show.
    tools = [name for name in ("memcheck", "racecheck") if found.pop(name) == "127"]
    assert found == dict.fromkeys(STAGES, "0"), done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 40
    assert lines[-1].startswith(f"everything: {tmp_path / 'found'}, ")
    assert done.returncode == (1 if tools else 0)
    for name in STAGES:
        assert (tmp_path / "found" / f"{name}.log").read_text().endswith("with 1\n"), name
    assert not list((ROOT / "bench").glob("__init__.py"))


@pytest.mark.parametrize(("what", "stage"), [("bench.memory", "memory"), ("bench/ --ignore", "bench")])
def test_one_that_fails_stops_no_other(tmp_path, what, stage):
    done = run(tmp_path, failing=what)
    assert done.returncode == 1
    assert {name for name, code in stages(tmp_path).items() if code == "3"} == {stage}
    assert set(STAGES) <= set(stages(tmp_path))
    assert "FAILED 3" in done.stdout


def test_tuning_is_asked_for(tmp_path):
    run(tmp_path, TUNE="1")
    assert stages(tmp_path)["tune"] == "0"


def test_what_tuning_wrote_is_left(tmp_path):
    run(tmp_path, TUNE="write")
    assert (tmp_path / "found" / "tuned" / "_gemm.py").read_text().startswith('"""')


def test_all_in_one_archive(tmp_path):
    done = run(tmp_path, PACK="1")
    found = tmp_path / "found"
    assert {file.name for file in found.iterdir()} == {"summary.txt", "everything.tar.gz"}
    with tarfile.open(found / "everything.tar.gz") as archive:
        names = set(archive.getnames())
    assert {f"./{name}.log" for name in STAGES} | {"./stages.txt"} <= names
    assert (found / "summary.txt").read_text() in done.stdout


def test_no_gpu(tmp_path):
    done = run(tmp_path, NO_GPU="1")
    assert done.returncode == 1
    assert done.stderr == "gpu_suite: PyTorch finds no CUDA GPU\n"
