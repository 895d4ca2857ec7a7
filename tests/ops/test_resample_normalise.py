import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from merv_fast.ops import resample_normalise

# The package exports the function under the module's name.
module = importlib.import_module("merv_fast.ops.resample_normalise")

METHODS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def table(channels=3, dtype=torch.float32, seed=0):
    """Different values for each channel and level."""
    return torch.randn(channels, 256, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plainly(frames, size, method, crop, levels):
    """Pillow's picture of every frame, cut and looked up by NumPy."""
    top, left, rows, columns = crop
    out = []
    for frame in frames:
        planes = [Image.fromarray(p.numpy()).resize(size[::-1], METHODS[method]) for p in frame.unbind(-1)]
        part = [np.asarray(plane)[top : top + rows, left : left + columns] for plane in planes]
        out.append(
            torch.stack([row[torch.from_numpy(p.astype(np.int64))] for row, p in zip(levels, part, strict=True)])
        )
    return torch.stack(out)


side = st.integers(1, 60)


@settings(max_examples=60, deadline=None)
@given(
    H=side, W=side, h=side, w=side, C=st.integers(1, 6), method=st.sampled_from(list(METHODS)), cut=st.integers(0, 9999)
)
def test_equals_pillow_and_a_look_up(H, W, h, w, C, method, cut):
    top, left = cut % h, cut % w
    crop = (top, left, 1 + cut % (h - top), 1 + cut % (w - left))
    frames, levels = noise(2, H, W, C, seed=cut), table(C)
    expected = plainly(frames, (h, w), method, crop, levels)
    for (got,) in (
        resample_normalise(frames, (h, w), method, crop, [levels]),
        module.reference(frames, [h, w], method, list(crop), [levels]),
    ):
        assert torch.equal(got, expected)
        assert got.is_contiguous()


def test_every_table_has_its_own_dtype():
    frames, levels = noise(2, 30, 40, 3), [table(dtype=dtype, seed=e) for e, dtype in enumerate(DTYPES)]
    got = resample_normalise(frames, (12, 14), "bicubic", (1, 2, 9, 11), levels)
    for out, own in zip(got, levels, strict=True):
        assert out.dtype == own.dtype
        assert torch.equal(out, plainly(frames, (12, 14), "bicubic", (1, 2, 9, 11), own))


@pytest.mark.parametrize("lead", [(), (0,), (5,), (2, 3), (2, 0, 3)], ids=str)
def test_leading_dimensions(lead):
    frames = noise(*lead, 12, 17, 3)
    (got,) = resample_normalise(frames, (9, 20), "bilinear", (0, 1, 8, 9), [table()])
    assert got.shape == (*lead, 3, 8, 9)
    flat = frames.reshape(-1, 12, 17, 3)
    if len(flat):
        assert torch.equal(got.reshape(-1, 3, 8, 9), plainly(flat, (9, 20), "bilinear", (0, 1, 8, 9), table()))


def test_any_strides():
    frames, levels = noise(3, 2, 40, 30), table(6)[::2]
    for view in (
        frames.permute(1, 2, 3, 0),
        frames[::1, :, ::2].permute(1, 3, 2, 0),
        frames[:, :, :, ::3].movedim(0, 3),
    ):
        arguments = ((7, 8), "bicubic", (1, 0, 6, 8))
        (got,) = resample_normalise(view, *arguments, [levels])
        assert torch.equal(got, plainly(view.contiguous(), *arguments, levels.contiguous()))


def test_operator_contract():
    op = torch.ops.merv_fast.resample_normalise.default
    for lead in ((), (2, 3), (0,)):
        levels = [table(), table(dtype=torch.float64)]
        torch.library.opcheck(op, (noise(*lead, 6, 9, 3), (4, 5), "bilinear", (1, 1, 3, 2), levels))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    compiled = torch.compile(
        lambda frames, levels: resample_normalise(frames, (7, 5), "bicubic", (1, 1, 5, 4), [levels])[0] + 1,
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    for shape in ((2, 12, 17, 3), (3, 9, 17, 3)):
        frames = noise(*shape)
        (eager,) = resample_normalise(frames, (7, 5), "bicubic", (1, 1, 5, 4), [table()])
        assert torch.equal(compiled(frames, table()), eager + 1)


FRAMES, LEVELS = torch.zeros(2, 4, 5, 3, dtype=torch.uint8), [torch.zeros(3, 256)]
ERRORS = [
    ((FRAMES.float(), (2, 2), "bicubic", (0, 0, 2, 2), LEVELS), TypeError, "frames must be uint8, got torch.float32"),
    (
        (FRAMES[0, 0], (2, 2), "bicubic", (0, 0, 2, 2), LEVELS),
        ValueError,
        "frames must be [..., H, W, C], got shape (5, 3)",
    ),
    (
        (FRAMES, (2, 0), "bicubic", (0, 0, 2, 2), LEVELS),
        ValueError,
        "size must be (rows, columns), both at least 1, got (2, 0)",
    ),
    (
        (FRAMES, (2, 2), "box", (0, 0, 2, 2), LEVELS),
        ValueError,
        "method must be 'bicubic' or 'bilinear', got 'box'",
    ),
    (
        (FRAMES, (2, 2), "bicubic", (0, 0, 2), LEVELS),
        ValueError,
        "crop must be (top, left, rows, columns), got (0, 0, 2)",
    ),
    (
        (FRAMES, (2, 2), "bicubic", (0, 1, 2, 2), LEVELS),
        ValueError,
        "crop must lie inside (2, 2) and not be empty, got (0, 1, 2, 2)",
    ),
    (
        (FRAMES, (2, 2), "bicubic", (-1, 0, 2, 2), LEVELS),
        ValueError,
        "crop must lie inside (2, 2) and not be empty, got (-1, 0, 2, 2)",
    ),
    (
        (FRAMES, (2, 2), "bicubic", (0, 0, 0, 2), LEVELS),
        ValueError,
        "crop must lie inside (2, 2) and not be empty, got (0, 0, 0, 2)",
    ),
    ((FRAMES, (2, 2), "bicubic", (0, 0, 2, 2), []), ValueError, "levels must be at least one table, got none"),
    (
        (FRAMES, (2, 2), "bicubic", (0, 0, 2, 2), [LEVELS[0].int()]),
        TypeError,
        "levels[0] must be float64, float32, bfloat16 or float16, got torch.int32",
    ),
    (
        (FRAMES, (2, 2), "bicubic", (0, 0, 2, 2), [*LEVELS, LEVELS[0][:2]]),
        ValueError,
        "levels[1] must be [3, 256], got shape (2, 256)",
    ),
    (
        (FRAMES, (2, 2), "bicubic", (0, 0, 2, 2), [LEVELS[0].to("meta")]),
        ValueError,
        "levels[0] must be on cpu like frames, got meta",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS, ids=[text for *_, text in ERRORS])
def test_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error) as raised:
        resample_normalise(*arguments)
    assert str(raised.value) == f"resample_normalise: {message}"
