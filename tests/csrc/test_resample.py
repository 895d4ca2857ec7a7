"""The resampling kernels alone, built without torch under the address sanitizer: on the CPU, and CUDA's on the host."""

import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
COMPILER = shutil.which(os.environ.get("CXX") or "c++")
METHODS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@dataclass(frozen=True)
class Case:
    """Frames [count, H, W, C] resized to h x w, of which ``crop`` is cut out."""

    count: int
    H: int
    W: int
    h: int
    w: int
    method: str
    C: int = 3
    crop: tuple[int, int, int, int] | None = None
    row_gap: int = 0
    frame_gap: int = 0
    offset: int = 0
    fits: bool = True
    """Whether tiles of the CUDA kernel fit into shared memory."""


CASES = [
    Case(2, 45, 80, 14, 14, "bicubic"),
    Case(2, 45, 80, 14, 14, "bilinear"),
    Case(1, 72, 128, 30, 100, "bicubic"),  # two tiles of columns
    Case(1, 72, 128, 30, 101, "bicubic"),  # the second of them with a column less
    Case(1, 20, 33, 50, 70, "bicubic"),  # upwards; rows not aligned
    Case(1, 20, 32, 50, 70, "bilinear", offset=1),
    Case(3, 17, 32, 9, 10, "bicubic", row_gap=5),
    Case(1, 17, 20, 9, 10, "bicubic", row_gap=4),  # aligned rows that end inside a chunk
    Case(2, 17, 32, 9, 10, "bicubic", frame_gap=8),  # every other frame aligned
    Case(2, 120, 20, 14, 14, "bicubic"),  # vertical first
    Case(2, 120, 16, 14, 15, "bilinear", crop=(2, 3, 9, 7)),
    Case(1, 60, 30, 20, 10, "bicubic"),  # just not vertical first
    Case(1, 14, 80, 14, 20, "bicubic"),  # one pass
    Case(1, 80, 14, 20, 14, "bicubic"),
    Case(2, 80, 14, 20, 14, "bicubic", row_gap=2),  # aligned rows of no whole words
    Case(2, 80, 16, 20, 16, "bicubic", row_gap=2),  # whole words in rows that are not aligned
    Case(2, 80, 16, 20, 16, "bicubic", frame_gap=2),
    Case(1, 80, 16, 20, 16, "bicubic", offset=1),
    Case(1, 20, 700, 9, 700, "bicubic"),  # three blocks of a row
    Case(1, 20, 701, 9, 701, "bicubic"),
    Case(2, 14, 15, 14, 15, "bicubic"),  # none
    Case(2, 14, 15, 14, 15, "bicubic", crop=(1, 2, 10, 9)),
    Case(2, 60, 200, 36, 120, "bilinear", crop=(2, 44, 32, 32)),  # a window that starts inside a chunk
    Case(1, 9, 1400, 8, 350, "bicubic", crop=(0, 300, 8, 50)),
    Case(1, 2, 5000, 2, 2, "bicubic", fits=False),
    Case(1, 3, 900, 3, 1, "bilinear"),
    Case(1, 1, 1, 7, 5, "bicubic"),
    Case(1, 40, 30, 1, 1, "bicubic"),
    Case(2, 20, 31, 9, 40, "bicubic", C=1),
    Case(2, 20, 31, 9, 40, "bilinear", C=4),
    Case(1, 20, 31, 9, 12, "bicubic", C=5, crop=(1, 2, 7, 9)),
    Case(2, 20, 31, 20, 12, "bicubic", C=4, crop=(3, 2, 9, 7)),  # a window of fewer rows than the frames have
    Case(1, 6, 7, 9, 12, "bicubic", C=300),
]


@pytest.fixture(scope="module", params=["dispatched", "baseline"])
def driver(request, tmp_path_factory):
    """The driver, which stops at the first step outside a buffer and at undefined behaviour.

    "baseline" has no clones of its functions for wider vectors, as on other systems and older processors.
    """
    program = tmp_path_factory.mktemp("driver") / "resample"
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-strict-aliasing"]
    flags = ["-O1", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", *checks]
    flags += ["-U__gnu_linux__"] if request.param == "baseline" else []
    source = HERE / "resample_driver.cpp"
    subprocess.run([COMPILER, *flags, f"-I{CSRC / 'include'}", str(source), "-o", str(program)], check=True)
    return program


def pillow(frames, case):
    """[count, rows, columns, C], channel by channel."""
    top, left, rows, columns = case.crop or (0, 0, case.h, case.w)
    resized = [
        [np.asarray(Image.fromarray(plane).resize((case.w, case.h), METHODS[case.method])) for plane in planes]
        for planes in frames.transpose(0, 3, 1, 2)
    ]
    return np.array(resized).transpose(0, 2, 3, 1)[:, top : top + rows, left : left + columns]


@pytest.mark.parametrize("levels", [False, True], ids=["bytes", "levels"])
@pytest.mark.parametrize("kernel", ["cpu", "cuda"])
def test_equals_pillow_and_stays_in_its_buffers(driver, kernel, levels):
    """One process for all cases; the frames are 0 and 255 only, which make the cubic overshoot and clip."""
    random = np.random.default_rng(0)
    requests, expected = b"", []
    for case in CASES:
        frames = random.integers(0, 2, (case.count, case.H, case.W, case.C), dtype=np.uint8) * 255
        row_stride = case.W * case.C + case.row_gap
        frame_stride = case.H * row_stride + case.frame_gap
        memory = random.integers(0, 256, case.offset + case.count * frame_stride, dtype=np.uint8)
        apart = memory[case.offset :].reshape(case.count, frame_stride)[:, : case.H * row_stride]
        apart.reshape(case.count, case.H, row_stride)[:, :, : case.W * case.C] = frames.reshape(case.count, case.H, -1)
        memory = memory[: len(memory) - case.row_gap - case.frame_gap]
        crop = case.crop or (0, 0, case.h, case.w)
        numbers = (kernel == "cuda", case.count, case.H, case.W, case.C, case.h, case.w, case.method == "bicubic")
        layout = (frame_stride, row_stride, case.offset, len(memory), levels, case.fits)
        requests += struct.pack("18q", *numbers, *crop, *layout) + memory.tobytes()
        expected.append(pillow(frames, case))
    done = subprocess.run([driver], input=requests, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[:4000]
    at = 0
    for case, pixels in zip(CASES, expected, strict=True):
        if levels:
            planes = (pixels + 256 * np.arange(case.C)).astype(np.uint16).transpose(0, 3, 1, 2)
            for expected_planes in (planes, ~planes):
                got = np.frombuffer(done.stdout, np.uint16, planes.size, at).reshape(planes.shape)
                at += 2 * planes.size
                assert np.array_equal(got, expected_planes), case
        else:
            got = np.frombuffer(done.stdout, np.uint8, pixels.size, at).reshape(pixels.shape)
            at += pixels.size
            assert np.array_equal(got, pixels), case
    assert at == len(done.stdout)
