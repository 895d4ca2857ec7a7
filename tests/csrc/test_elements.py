"""The conversions of 16-bit elements from and to float32, for every kind of float32."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX") or "c++")
DTYPES = {"BFloat16": torch.bfloat16, "Float16": torch.float16}

SOURCE = """
#include <cstdio>
#include "merv_fast/elements.h"
using namespace merv_fast;

// Of each float32: its bits as an element, and of those bits the float32 again.
template <class Element>
void convert() {
  float value;
  while (std::fread(&value, 4, 1, stdin) == 1) {
    Element element;
    from_sum(value, element);
    const float again = to_sum(element);
    std::fwrite(&element, 2, 1, stdout);
    std::fwrite(&again, 4, 1, stdout);
  }
}

int main(int, char** arguments) { arguments[1][0] == 'B' ? convert<BFloat16>() : convert<Float16>(); }
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("elements")
    (folder / "elements.cpp").write_text(SOURCE)
    flags = ["-O1", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
    command = [COMPILER, *flags, f"-I{CSRC / 'include'}", str(folder / "elements.cpp"), "-o", str(folder / "elements")]
    subprocess.run(command, check=True)
    return folder / "elements"


def floats():
    """Every sign and exponent with the first and last mantissas, some between, and those around every tie."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    between = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    return torch.from_numpy(np.concatenate([(upper[:, None] | lower).ravel(), between]).view(np.float32))


@pytest.mark.parametrize("element", DTYPES)
def test_conversions_are_those_of_torch(program, element):
    values = floats()
    done = subprocess.run([program, element], input=values.numpy().tobytes(), capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()[:4000]
    got = np.frombuffer(done.stdout, np.dtype([("element", "<i2"), ("again", "<i4")]))
    rounded = values.to(DTYPES[element])
    for ours, theirs in (("element", rounded), ("again", rounded.float())):
        bits = torch.from_numpy(got[ours].copy())
        same = bits == theirs.view(bits.dtype)
        nan = bits.view(theirs.dtype).isnan()
        assert torch.equal(nan, values.isnan())
        assert (same | nan).all()
