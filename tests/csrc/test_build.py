"""The build hook compiles an op against PyTorch's stable ABI, and the op loads and runs."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler")
def test_an_op_compiles_loads_and_runs(tmp_path):
    hook = runpy.run_path(str(CSRC / "build.py"))
    library = tmp_path / "probe.so"
    hook["build"]([HERE / "probe.cpp"], library)
    code = (
        "import pathlib, torch, merv_fast.ops._native as native; "
        f"native.LIBRARY = pathlib.Path({str(library)!r}); native.load_native(); "
        "print(torch.ops.merv_fast_probe.twice(torch.tensor([1.0, 2.5])).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[2.0, 5.0]"


def test_without_sources_there_is_nothing_to_build():
    done = subprocess.run([sys.executable, str(CSRC / "build.py")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == "csrc: no sources yet, nothing to build"
