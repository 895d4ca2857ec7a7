"""Every kernel compiles for every GPU: no spills, shared memory enough, GEMMs on tensor cores, waits in place."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MODULES = sorted(path.stem for path in HERE.glob("launches_*.py"))

SHARED_MEMORY = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes a block may have. 80 stands for sm_86, sm_89 and sm_120 as well, which have less than sm_80 itself."""


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("module", MODULES)
def test_compiles(module, capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compiling", str(capability), module]
    done = subprocess.run(command, cwd=HERE.parent.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows
    for row in rows:
        assert row["stack"] == 0, row
        assert row["shared"] <= SHARED_MEMORY[capability], row
        if row["matrix"]:
            assert row["wgmma" if capability == 90 else "mma"] > 0, row
        # It waits where it is launched early, before all else, and only where the pooling lets it.
        chained = row["chained"] and capability >= 90
        assert row["dependent"] == row["waits"] == (chained and row["kernel"] == "gemm_kernel"), row
        assert row["releases"] == (chained and row["kernel"] == "pool_kernel"), row
        assert not row["early"], row
