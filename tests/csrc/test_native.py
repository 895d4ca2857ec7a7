"""The native CPU kernels behind the ops: they serve, agree with the references, and may be missing."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import merv_fast
from merv_fast.ops import fuse_encoders, pool_tokens, resample_frames, resample_normalise
from merv_fast.ops._native import LIBRARIES, native_fault
from merv_fast.runtime import environment
from tests.budgets import FLOAT64, low_precision, relative_error

pool = importlib.import_module("merv_fast.ops.pool_tokens")
fuse = importlib.import_module("merv_fast.ops.fuse_encoders")

OPS = ["fuse_encoders", "pool_tokens", "resample_frames", "resample_normalise"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PACKAGE = Path(merv_fast.__file__).parent

needs_native = pytest.mark.skipif(not LIBRARIES["cpu"].exists(), reason="needs the native CPU kernels to be built")


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@needs_native
@pytest.mark.parametrize("op", OPS)
def test_a_library_that_is_there_serves(op):
    assert native_fault("cpu") is None
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"merv_fast::{op}", "CPU")


def close(got, low, exact):
    """Whether ``got`` is as near to ``exact`` as the reference ``low`` of the same dtype may be."""
    if got.dtype == torch.float64:
        return relative_error(got, exact) <= FLOAT64
    return (got.double() - exact).abs().max().item() <= low_precision(low, exact)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("slots", "grid", "out_grid", "out_slots", "C"),
    [
        (2, (4, 4), (2, 2), 2, 64),
        (3, (5, 7), (3, 4), 3, 769),  # overlapping bins, a channel left over
        (2, (2, 3), (5, 4), 2, 33),  # upwards
        (5, (4, 4), (2, 2), 2, 32),  # overlapping slots
        (2, (3, 3), (1, 1), 4, 1),
        (1, (14, 14), (8, 8), 1, 1030),  # more than one block of channels
    ],
)
def test_pool_tokens_agrees_with_its_reference(dtype, slots, grid, out_grid, out_slots, C):
    x = randn(2, slots, grid[0] * grid[1], C, dtype=dtype)
    arguments = (list(grid), list(out_grid), out_slots)
    exact = pool.reference(x.double(), *arguments)
    got = pool_tokens(x, grid, out_grid, out_slots)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert close(got, pool.reference(x, *arguments), exact)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_values_are_read_and_rounded_as_torch_does(dtype):
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    same = pool_tokens(every.view(1, 1, 1, -1), (1, 1), (1, 1)).flatten()
    assert torch.equal(same.isnan(), every.isnan())
    assert torch.equal(same[~every.isnan()], every[~every.isnan()])
    # Means of two lie between neighbours, subnormal ones too; ties go to the even one.
    order = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))
    for other in (every.roll(1), every[order]):
        mean = pool_tokens(torch.stack([every, other])[None, None], (1, 2), (1, 1)).flatten()
        torch.testing.assert_close(
            mean, ((every.float() + other.float()) / 2).to(dtype), rtol=0, atol=0, equal_nan=True
        )


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(70, 70), (70, 1, 70), (1, 1), (3,)], ids=str)
@pytest.mark.parametrize("D", [1, 48, 769])
def test_fuse_encoders_agrees_with_its_reference(dtype, lengths, D):
    values = [randn(2, S, D, dtype=dtype, seed=e) for e, S in enumerate(lengths)]
    query, bias = randn(D, dtype=dtype, seed=8) / D**0.5, randn(len(lengths), dtype=dtype, seed=9)
    got = fuse_encoders(values, query, bias)
    exact = fuse.reference([value.double() for value in values], query.double(), bias.double())
    low = fuse.reference(values, query, bias)
    for one, low_one, exact_one in zip(got, low, exact, strict=True):
        assert one.dtype == low_one.dtype
        assert one.shape == low_one.shape
        assert close(one, low_one, exact_one)


@needs_native
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_go_where_the_reference_has_them(bad, dtype):
    x = randn(1, 2, 16, 40, dtype=dtype)
    x[0, 1, 5, 7] = bad
    expected = pool.reference(x, [4, 4], [2, 2], 2)
    assert torch.equal(pool_tokens(x, (4, 4), (2, 2)).isfinite(), expected.isfinite())
    values = [randn(3, 5, 40, dtype=dtype, seed=e) for e in range(2)]
    values[0][1, 2, 3] = bad
    query, bias = randn(40, dtype=dtype, seed=8), randn(2, dtype=dtype, seed=9)
    for got, low in zip(fuse_encoders(values, query, bias), fuse.reference(values, query, bias), strict=True):
        assert torch.equal(got.isnan(), low.isnan())
        assert torch.equal(got.isinf(), low.isinf())


@needs_native
def test_any_strides_and_empty_batches():
    x = randn(3, 2, 12, 40)
    for view in (x.transpose(1, 0), x[..., ::2], x[:, :, :, :1].expand(3, 2, 12, 40), x.permute(3, 1, 2, 0)):
        copy = view.contiguous()
        assert torch.equal(pool_tokens(view, (3, 4), (2, 2)), pool_tokens(copy, (3, 4), (2, 2)))
        values, query, bias = view.flatten(1, 2), randn(copy.shape[3], seed=8), randn(2, seed=9)
        alike = fuse_encoders([values.contiguous()] * 2, query, bias)
        strided = x.new_empty(*values.shape, 2)[..., 0].copy_(values)
        for got, expected in zip(fuse_encoders([strided, values], query.expand(2, -1)[1], bias), alike, strict=True):
            assert torch.equal(got, expected)
    assert pool_tokens(x[:0], (3, 4), (2, 2)).shape == (0, 2, 4, 40)
    tokens, weights = fuse_encoders([x[:0].flatten(1, 2)], x[0, 0, 0], x[0, 0, 0, :1])
    assert (tokens.shape, weights.shape) == ((0, 24, 40), (0, 1))


@needs_native
def test_threads_change_no_bit():
    frames = torch.randint(0, 256, (5, 60, 70, 3), dtype=torch.uint8)
    x, query = randn(5, 4, 36, 300, dtype=torch.float32), randn(300, dtype=torch.float32, seed=8)
    table = randn(3, 256, dtype=torch.float32)

    def everything():
        values = [x.flatten(1, 2), x[:, 0, :1]]
        normalised = resample_normalise(frames, (20, 30), "bilinear", (1, 2, 9, 11), [table])
        fused = fuse_encoders(values, query, query[:2])
        return [resample_frames(frames, (20, 30)), *normalised, pool_tokens(x, (6, 6), (4, 4), 3), *fused]

    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(everything())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((4, 720, 1280, 3), (224, 224)),
        ((2, 480, 854, 3), (224, 224)),
        ((2, 1080, 200, 3), (224, 224)),
        ((3, 33, 57, 3), (70, 224)),
        ((2, 224, 300, 3), (224, 224)),
        ((2, 300, 224, 3), (224, 224)),
        ((2, 224, 224, 3), (224, 224)),
        ((2, 50, 60, 5), (20, 70)),
        ((0, 50, 60, 3), (20, 70)),
    ],
    ids=str,
)
def test_the_gpu_gives_the_bits_of_the_cpu(shape, size, method):
    clip = torch.randint(0, 256, (2 * shape[0], *shape[1:]), dtype=torch.uint8)
    levels = [randn(shape[-1], 256, dtype=dtype) for dtype in DTYPES]
    crop = (3, 5, size[0] - 7, size[1] - 9)
    for frames in (clip, clip[::2], clip[:, 1:, 2:-3], clip.movedim(-1, 1).contiguous().movedim(1, -1)):
        on_gpu = (
            frames.to("cuda") if frames.is_contiguous() else clip.to("cuda").as_strided(frames.shape, frames.stride())
        )
        there = on_gpu.cpu()
        assert torch.equal(resample_frames(on_gpu, size, method).cpu(), resample_frames(there, size, method))
        got = resample_normalise(on_gpu, size, method, crop, [table.to("cuda") for table in levels])
        expected = resample_normalise(there, size, method, crop, levels)
        for one, other in zip(got, expected, strict=True):
            assert one.is_contiguous()
            assert torch.equal(one.cpu(), other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_reads_frames_of_any_leading_dimensions():
    x = torch.randint(0, 256, (2, 3, 5, 20, 24, 3), dtype=torch.uint8)
    for view in (x[:, :1, :3], x[:, :2], x[::2], x[:, :, ::2], x[:, :1], x.transpose(0, 1), x[0, 0, 0]):
        on_gpu = x.to("cuda").as_strided(view.shape, view.stride())
        expected = resample_frames(view, (9, 30), "bicubic")
        assert torch.equal(resample_frames(on_gpu, (9, 30), "bicubic").cpu(), expected)


BYTES = torch.zeros(2, 4, 5, 3, dtype=torch.uint8)
TABLE = torch.zeros(3, 256)
VALUES, QUERY, BIAS = [torch.zeros(1, 2, 8)] * 2, torch.zeros(8), torch.zeros(2)


@needs_native
@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("pool_tokens", (torch.zeros(1, 1, 4, 8), [20000, 20000], [1, 1], 1)),
        ("pool_tokens", (torch.zeros(1, 1, 4, 8), [2, 1], [1, 1], 1)),
        ("pool_tokens", (torch.zeros(1, 1, 4, 8), [-2, -2], [1, 1], 1)),
        ("pool_tokens", (torch.zeros(1, 1, 4, 8), [2, 2], [0, 1], 1)),
        ("pool_tokens", (torch.zeros(1, 1, 4, 8), [2, 2], [1, 0], 1)),
        ("pool_tokens", (torch.zeros(1, 1, 4, 8), [2, 2], [1, 1], 0)),
        ("pool_tokens", (torch.zeros(1, 4, 8), [2, 2], [1, 1], 1)),
        ("pool_tokens", (torch.zeros(1, 1, 4, 8, dtype=torch.int32), [2, 2], [1, 1], 1)),
        ("fuse_encoders", ([], QUERY, BIAS)),
        ("fuse_encoders", (VALUES * 6, QUERY, torch.zeros(12))),
        ("fuse_encoders", ([VALUES[0], VALUES[0].double()], QUERY, BIAS)),
        ("fuse_encoders", ([VALUES[0], torch.zeros(1, 3, 8)], QUERY, BIAS)),
        ("fuse_encoders", ([VALUES[0], torch.zeros(1, 2, 9)], QUERY, BIAS)),
        ("fuse_encoders", ([VALUES[0], torch.zeros(2, 2, 8)], QUERY, BIAS)),
        ("fuse_encoders", ([VALUES[0], torch.zeros(1, 2)], QUERY, BIAS)),
        ("fuse_encoders", (VALUES, QUERY[:7], BIAS)),
        ("fuse_encoders", (VALUES, QUERY[:, None], BIAS)),
        ("fuse_encoders", (VALUES, QUERY, BIAS[:1])),
        ("fuse_encoders", (VALUES, QUERY, BIAS[:, None])),
        ("fuse_encoders", (VALUES, QUERY, BIAS.double())),
        ("resample_frames", (BYTES.float(), [2, 2], "bicubic")),
        ("resample_frames", (BYTES[0, 0], [2, 2], "bicubic")),
        ("resample_frames", (BYTES, [2], "bicubic")),
        ("resample_frames", (BYTES, [0, 2], "bicubic")),
        ("resample_frames", (BYTES, [2, 0], "bicubic")),
        ("resample_frames", (BYTES, [2, 2], "nearest")),
        ("resample_frames", (BYTES[:, :0], [2, 2], "bicubic")),
        ("resample_frames", (BYTES[..., :0], [2, 2], "bicubic")),
        ("resample_normalise", (BYTES, [4, 4], "bicubic", [0, 0, 400, 400], [TABLE])),
        ("resample_normalise", (BYTES, [4, 4], "bicubic", [3, 0, 2, 2], [TABLE])),
        ("resample_normalise", (BYTES, [4, 4], "bicubic", [0, 3, 2, 2], [TABLE])),
        ("resample_normalise", (BYTES, [4, 4], "bicubic", [-1, 0, 2, 2], [TABLE])),
        ("resample_normalise", (BYTES, [4, 4], "bicubic", [0, -1, 2, 2], [TABLE])),
        ("resample_normalise", (BYTES, [4, 4], "bicubic", [0, 0, 0, 2], [TABLE])),
        ("resample_normalise", (BYTES, [4, 4], "bicubic", [0, 0, 2, 0], [TABLE])),
        ("resample_normalise", (BYTES, [4, 4], "bicubic", [0, 0, 2], [TABLE])),
        ("resample_normalise", (BYTES, [4, 4], "bicubic", [0, 0, 2, 2], [TABLE[:, :2]])),
        ("resample_normalise", (BYTES, [4, 4], "bicubic", [0, 0, 2, 2], [TABLE[:2]])),
        ("resample_normalise", (BYTES, [4, 4], "bicubic", [0, 0, 2, 2], [TABLE[..., None]])),
        ("resample_normalise", (BYTES, [4, 4], "bicubic", [0, 0, 2, 2], [TABLE.to(torch.uint8)])),
    ],
)
def test_an_op_that_is_called_by_its_name_refuses_what_it_cannot_do(op, arguments):
    with pytest.raises(RuntimeError, match="must"):
        getattr(torch.ops.merv_fast, op)(*arguments)


def test_doctor_knows_the_kernels(monkeypatch):
    def found():
        return {part.name: part for part in environment.components()}

    monkeypatch.setattr(environment, "native_fault", lambda name: None)
    assert {found()[f"native {kind} kernels"].version for kind in ("CPU", "CUDA")} == {"built"}
    monkeypatch.setattr(environment, "native_fault", lambda name: "not built")
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    assert all(found()[name].version is None for name in ("native CPU kernels", "C++ compiler", "nvcc"))
    assert found()["native CPU kernels"].remedy.startswith("not built: pip install --no-build-isolation")


def run_copy(directory, code):
    """Run ``code`` with the copy of the package that lies in ``directory``: (output, error output)."""
    check = "import sys, merv_fast; assert merv_fast.__file__.startswith(sys.argv[1]), merv_fast.__file__; "
    command = [sys.executable, "-c", check + code, str(directory)]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


USE = """
import torch
from merv_fast.ops import fuse_encoders, pool_tokens, resample_frames, resample_normalise
from merv_fast.ops._native import native_fault
print(native_fault("cpu"), torch._C._dispatch_has_kernel_for_dispatch_key("merv_fast::pool_tokens", "CPU"))
x = torch.ones(1, 2, 4, 5)
assert pool_tokens(x, (2, 2), (1, 1)).shape == (1, 2, 1, 5)
assert fuse_encoders([x[0]], x[0, 0, 0], x[0, 0, 0, :1])[0].shape == (2, 4, 5)
frames = torch.zeros(2, 9, 9, 3, dtype=torch.uint8)
assert resample_frames(frames, (4, 5)).shape == (2, 4, 5, 3)
assert resample_normalise(frames, (4, 5), "bicubic", (0, 0, 4, 4), [torch.zeros(3, 256)])[0].shape == (2, 3, 4, 4)
"""


@pytest.mark.parametrize("library", ["absent", "unreadable", "of other sources"])
def test_works_without_a_library_that_fits(tmp_path, library):
    shutil.copytree(PACKAGE, tmp_path / "merv_fast", ignore=shutil.ignore_patterns("_C*", "__pycache__", "assets"))
    copied = tmp_path / "merv_fast" / "_C.so"
    if library == "unreadable":
        copied.write_bytes(b"not a library")
    if library == "of other sources":
        copied.write_bytes(LIBRARIES["cpu"].read_bytes() if LIBRARIES["cpu"].exists() else b"")
        (tmp_path / "csrc" / "include" / "merv_fast").mkdir(parents=True)
        (tmp_path / "csrc" / "include" / "merv_fast" / "pool.h").write_text("// changed since")
    output, errors = run_copy(tmp_path, USE)
    faults = {"absent": "not built", "unreadable": "cannot be loaded", "of other sources": "built from other sources"}
    assert output.startswith(faults[library])
    assert output.strip().endswith("False")
    assert ("is not used" in errors) == (library != "absent")
