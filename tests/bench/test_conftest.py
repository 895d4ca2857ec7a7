"""MERV_FAST_REQUIRE_CUDA=1: no GPU ends the session, and nothing is skipped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parent.parent / "conftest.py"

TESTS = {
    "test_skips.py": """
import pytest

def test_passes():
    pass

@pytest.mark.skipif(True, reason="no camel")
def test_marked():
    pass

def test_skips_inside():
    pytest.skip("no llama")

@pytest.mark.xfail(reason="known")
def test_expected_to_fail():
    assert False
""",
    "test_module.py": """
import pytest

pytest.importorskip("no_such_module")
""",
    "pretend_gpu.py": """
import torch

torch.cuda.is_available = lambda: True
""",
}


def run(directory: Path, *options: str) -> subprocess.CompletedProcess:
    for name, text in TESTS.items():
        (directory / name).write_text(text)
    (directory / "conftest.py").write_text(CONFTEST.read_text())
    (directory / "pytest.ini").write_text("[pytest]\n")
    environment = os.environ | {"MERV_FAST_REQUIRE_CUDA": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors", *options]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120)


def test_skips_fail_where_a_gpu_is_required(tmp_path):
    done = run(tmp_path, "-p", "pretend_gpu")
    assert done.returncode == 1, done.stdout
    # A mark speaks up before the test, an import before the collection: errors.
    assert "1 failed, 1 passed, 1 xfailed, 2 errors" in done.stdout.splitlines()[-1]
    for reason in ("no camel", "no llama", "no_such_module"):
        assert reason in done.stdout


def test_a_session_without_a_gpu_ends_at_once(tmp_path):
    done = run(tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "MERV_FAST_REQUIRE_CUDA=1, but PyTorch finds no CUDA GPU" in done.stderr
    assert "passed" not in done.stdout
