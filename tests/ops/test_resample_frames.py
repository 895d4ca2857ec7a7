import importlib

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from merv_fast.ops import resample_frames
from tests.golden_files import load

# The package exports the function under the module's name.
module = importlib.import_module("merv_fast.ops.resample_frames")

METHODS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
CLIPS = {
    "letterboxed-clip": ((272, 640), (224, 224)),
    "dvd": ((480, 854), (224, 224)),
    "upwards": ((100, 80), (224, 224)),
    "one-off": ((225, 223), (224, 224)),
    "tall": ((1080, 200), (224, 224)),
    "identity": ((224, 224), (224, 224)),
    "rows-only": ((300, 224), (224, 224)),
    "columns-only": ((224, 300), (224, 224)),
}


def pillow(frame: Tensor, size: tuple[int, int], method: str) -> Tensor:
    """Channel by channel, so that any number of channels can be asked for."""
    planes = [Image.fromarray(plane.numpy()) for plane in frame.unbind(-1)]
    resized = [np.array(plane.resize(size[::-1], METHODS[method])) for plane in planes]
    return torch.from_numpy(np.stack(resized, -1))


def noise(*shape: int, seed: int = 0, extremes: bool = False) -> Tensor:
    """Uniform bytes, or only 0 and 255, which make the cubic overshoot and clip."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return (picture > 127).byte() * 255 if extremes else picture


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CLIPS.values(), ids=CLIPS.keys())
def test_equals_pillow_at_clip_sizes(case, method):
    size, out = case
    frame = noise(*size, 3, extremes=True)
    expected = torch.from_numpy(np.array(Image.fromarray(frame.numpy()).resize(out[::-1], METHODS[method])))
    assert torch.equal(resample_frames(frame, out, method), expected)


side = st.integers(1, 80)


@settings(max_examples=100, deadline=None)
@given(H=side, W=side, h=side, w=side, method=st.sampled_from(list(METHODS)), seed=st.integers(0, 9))
@example(H=1, W=1, h=1, w=1, method="bicubic", seed=0)
@example(H=1, W=1, h=7, w=5, method="bicubic", seed=0)
@example(H=64, W=80, h=1, w=1, method="bicubic", seed=0)
@example(H=60, W=30, h=20, w=10, method="bicubic", seed=0)
@example(H=60, W=30, h=20, w=11, method="bicubic", seed=0)
@example(H=20, W=30, h=20, w=31, method="bilinear", seed=0)
def test_equals_pillow_at_any_size(H, W, h, w, method, seed):
    frame = noise(H, W, 2, seed=seed, extremes=seed % 2 == 0)
    expected = pillow(frame, (h, w), method)
    assert torch.equal(resample_frames(frame, (h, w), method), expected)
    assert torch.equal(module.reference(frame, [h, w], method), expected)


@pytest.mark.parametrize(("name", "method"), [("dinov2", "bicubic"), ("siglip", "bicubic"), ("vivit", "bilinear")])
def test_equals_the_reference_pipelines(name, method):
    tensors, _ = load("preprocess")
    assert torch.equal(resample_frames(tensors["frame"], (224, 224), method), tensors[f"{name}.uint8"])


@pytest.mark.parametrize("lead", [(), (0,), (5,), (2, 3), (2, 0, 3)], ids=str)
def test_leading_dimensions(lead):
    frames = noise(*lead, 12, 17, 3)
    got = resample_frames(frames, (9, 20))
    assert got.shape == (*lead, 9, 20, 3)
    assert got.is_contiguous()
    for frame, resized in zip(frames.reshape(-1, 12, 17, 3), got.reshape(-1, 9, 20, 3), strict=True):
        assert torch.equal(resized, pillow(frame, (9, 20), "bicubic"))


@pytest.mark.parametrize("size", [(9, 20), (40, 50)], ids=str)
def test_long_clip_is_cut_into_chunks(monkeypatch, size):
    frames = noise(7, 12, 17, 3)
    whole = module.reference(frames, list(size), "bicubic")
    most, columns = 3 * max(12, size[0]) * max(17, size[1]) * 3, module._columns
    held = []

    def watched(planes: Tensor, m: int, method: str) -> Tensor:
        out = columns(planes, m, method)
        held.append(max(planes.numel(), out.numel()))
        return out

    monkeypatch.setattr(module, "_CHUNK", most)
    monkeypatch.setattr(module, "_columns", watched)
    assert torch.equal(module.reference(frames, list(size), "bicubic"), whole)
    assert len(held) == 3
    assert max(held) <= most


def test_any_strides():
    frames = noise(3, 2, 40, 30)
    views = [frames.permute(1, 2, 3, 0), frames[..., ::2].transpose(0, 3), frames[:1].expand(5, 2, 40, 30)]
    views += [frames[..., ::2, :], frames[..., 1:4]]
    for view in views:
        assert torch.equal(resample_frames(view, (7, 8)), resample_frames(view.contiguous(), (7, 8)))


def test_returns_a_copy_even_of_the_same_size():
    frame = noise(4, 4, 3)
    got = resample_frames(frame, (4, 4))
    got.zero_()
    assert frame.any()


def test_operator_contract():
    op = torch.ops.merv_fast.resample_frames.default
    for lead in ((), (2, 3), (0,)):
        torch.library.opcheck(op, (noise(*lead, 6, 9, 3), (4, 5), "bilinear"))
    torch.library.opcheck(op, (noise(4, 4, 3), (4, 4), "bicubic"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    compiled = torch.compile(
        lambda frames: resample_frames(frames, (7, 5)) + 1,
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    for shape in ((2, 12, 17, 3), (3, 9, 17, 3)):
        assert torch.equal(compiled(noise(*shape)), resample_frames(noise(*shape), (7, 5)) + 1)


FRAMES = torch.zeros(2, 4, 5, 3, dtype=torch.uint8)
ERRORS = [
    ((FRAMES.float(), (2, 2)), TypeError, "resample_frames: frames must be uint8, got torch.float32"),
    ((FRAMES[0, 0], (2, 2)), ValueError, "resample_frames: frames must be [..., H, W, C], got shape (5, 3)"),
    (
        (FRAMES[:, :0], (2, 2)),
        ValueError,
        "resample_frames: frames must be [..., H, W, C], got shape (2, 0, 5, 3)",
    ),
    (
        (FRAMES, (2, 0)),
        ValueError,
        "resample_frames: size must be (rows, columns), both at least 1, got (2, 0)",
    ),
    ((FRAMES, (2,)), ValueError, "resample_frames: size must be (rows, columns), both at least 1, got (2,)"),
    (
        (FRAMES, (2, 2), "lanczos"),
        ValueError,
        "resample_frames: method must be 'bicubic' or 'bilinear', got 'lanczos'",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS, ids=[text for *_, text in ERRORS])
def test_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error) as raised:
        resample_frames(*arguments)
    assert str(raised.value) == message
