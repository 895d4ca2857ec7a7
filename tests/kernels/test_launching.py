"""Every call packs its arguments as a driver takes them, descriptors among them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from tests.kernels.test_compiling import MODULES

HERE = Path(__file__).parent
HEADERS = Path(triton.__file__).parent / "backends/nvidia/include"
PERSISTENT = ", persistent"
SMS = 132
"""What the driver says of its GPU."""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcuda.so.1 that checks launches and runs nothing."""
    folder = tmp_path_factory.mktemp("driver")
    command = ["cc", "-shared", "-fPIC", f"-I{HEADERS}", HERE / "libcuda.c", "-o", folder / "libcuda.so.1"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("module", MODULES)
def test_launches(module, driver):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_LIBCUDA_PATH": str(driver), "LD_LIBRARY_PATH": str(driver)}
    command = [sys.executable, "-m", "tests.kernels.launching", "90", module]
    done = subprocess.run(command, cwd=HERE.parent.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    launches: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("launch "):
            launches[next(reversed(launches))].append(line)
        else:
            launches[line] = []
    assert launches
    for name, own in launches.items():
        assert own, f"{name} launches nothing"
        # What makes score vectors, and the pooling, wait for all in front of them.
        after = re.search(r"\(dependent after (\d+)\)$", name)
        chained = own[int(after[1]) :] if after else []
        assert [line for line in own if line.endswith(" dependent")] == chained, name
        if name.endswith(PERSISTENT):
            plain, persistent = (int(one.split()[1]) for one in (launches[name.removesuffix(PERSISTENT)][0], own[0]))
            assert persistent == min(plain, SMS), name
