"""Whether frames lie at one distance, told from sizes and strides alone."""

import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("c++")

SOURCE = """
#include <cstdio>
#include "merv_fast/spacing.h"

int main() {
  long dims;
  while (std::scanf("%ld", &dims) == 1) {
    std::vector<int64_t> sizes(dims), strides(dims);
    for (auto* values : {&sizes, &strides})
      for (auto& value : *values) {
        long read;
        if (std::scanf("%ld", &read) != 1) return 1;
        value = read;
      }
    int64_t stride;
    const bool even = merv_fast::even_spacing(sizes, strides, stride);
    std::printf("%d %ld\\n", even, static_cast<long>(stride));
  }
}
"""


def views():
    x = torch.empty(4, 3, 6)
    yield from (x, x[:, :, :3], x[:, :2], x[::2], x[::2, :, :], x[:, :, ::2], x[:1], x[:, :1], x[:, :, :1], x[0, 0])
    # Between two dimensions that do not lie evenly, one of a single element.
    yield x[:, :1].expand(4, 1, 6)[:, :, :3]
    yield torch.empty(2, 1, 5)[:, :, :3]
    yield torch.empty(2, 1, 5, 1)
    yield from (x.transpose(0, 1), x.movedim(-1, 0), x[0, 0, :1], torch.empty(6)[::2], torch.empty(()))
    yield torch.empty(1, 6).expand(4, 6)


@pytest.fixture
def program(tmp_path):
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    source, program = tmp_path / "spacing.cpp", tmp_path / "spacing"
    source.write_text(SOURCE)
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
    subprocess.run([COMPILER, *flags, f"-I{CSRC / 'include'}", str(source), "-o", str(program)], check=True)
    return program


def test_even_spacing(program):
    cases = list(views())
    text = "".join(" ".join(map(str, (x.dim(), *x.shape, *x.stride()))) + "\n" for x in cases)
    done = subprocess.run([program], input=text, capture_output=True, text=True, timeout=60, check=True)
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    for x, (even, stride) in zip(cases, lines, strict=True):
        # Where the elements are, in order.
        places = (
            [
                sum(i * step for i, step in zip(at, x.stride(), strict=True))
                for at in torch.cartesian_prod(*map(torch.arange, x.shape)).view(-1, max(x.dim(), 1)).tolist()
            ]
            if x.dim()
            else [0]
        )
        distances = {b - a for a, b in pairwise(places)}
        assert even == (len(distances) < 2), (x.shape, x.stride())
        if even:
            assert {stride} == (distances or {0}), (x.shape, x.stride())
