import importlib
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from merv_fast.ops import resample_frames
from merv_fast.video import Recipe, every, prepare
from tests.budgets import NORMALISED_FRAMES
from tests.golden_files import load

# The package exports a function under the module's name.
module = importlib.import_module("merv_fast.video.prepare")
prepare_all = module.prepare_all

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
RECIPES = {
    "dinov2": Recipe(224, 224, "resize-naive", "bicubic", True, *IMAGENET),
    "siglip": Recipe(224, 224, "resize-naive", "bicubic", True, *HALF),
    "vivit": Recipe(224, 256, "resize-naive", "bilinear", True, *HALF),
    "languagebind": Recipe(224, 224, "resize-naive", "bilinear", False, *OPENAI),
}
SMALL = Recipe(32, 36, "resize-crop", "bilinear", True, *IMAGENET)
FLOAT = Recipe(32, 36, "resize-naive", "bilinear", False, *OPENAI)
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def frames(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def levels(prepared):
    """Undo the normalisation of a recipe with mean 0 and std 1."""
    return (prepared * 255).round().to(torch.uint8).movedim(-3, -1)


def plain(recipe):
    return replace(recipe, mean=(0, 0, 0), std=(1, 1, 1))


@pytest.mark.parametrize("encoder", RECIPES)
def test_golden_normalised(encoder):
    golden, _ = load("preprocess")
    expected = golden[f"{encoder}.normalized"].reshape(3, 224, 224)
    got = prepare(golden["frame"], RECIPES[encoder])
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    torch.testing.assert_close(got, expected, rtol=0, atol=NORMALISED_FRAMES)


@pytest.mark.parametrize("encoder", ["dinov2", "siglip", "vivit"])
def test_golden_8_bit(encoder):
    golden, _ = load("preprocess")
    assert torch.equal(levels(prepare(golden["frame"], plain(RECIPES[encoder]))), golden[f"{encoder}.uint8"])


def pillow(frame, recipe):
    """torchvision's letterbox, Resize(int), CenterCrop and ToTensor rules, spelled with Pillow."""
    picture = Image.fromarray(frame.numpy())
    width, height = picture.size
    if recipe.resize == "letterbox":
        side = max(width, height)
        across, down = int((side - width) / 2), int((side - height) / 2)
        fill = tuple(int(255 * value) for value in recipe.mean)
        picture = ImageOps.expand(picture, (across, down, across, down), fill)
        width, height = picture.size
    if width <= height:
        size = (recipe.short_side, int(recipe.short_side * height / width))
    else:
        size = (int(recipe.short_side * width / height), recipe.short_side)
    picture = picture.resize(size, FILTERS[recipe.method])
    if min(size) < recipe.size:
        across, down = max(recipe.size - size[0], 0), max(recipe.size - size[1], 0)
        picture = ImageOps.expand(picture, (across // 2, down // 2, (across + 1) // 2, (down + 1) // 2), 0)
    left = round((picture.width - recipe.size) / 2.0)
    top = round((picture.height - recipe.size) / 2.0)
    picture = picture.crop((left, top, left + recipe.size, top + recipe.size))
    normalised = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.mean, recipe.std))
    return (normalised - mean) / std


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize("short_side", [32, 36, 27], ids=["exact", "larger", "padded"])
@pytest.mark.parametrize("resize", ["letterbox", "resize-crop"])
@pytest.mark.parametrize("shape", [(48, 85), (85, 48), (60, 61), (40, 40), (31, 97)], ids=str)
def test_geometry_is_torchvision_s(shape, resize, short_side, method):
    recipe = replace(SMALL, resize=resize, method=method, short_side=short_side)
    batch = frames(2, *shape, 3)
    expected = torch.stack([pillow(frame, recipe) for frame in batch])
    torch.testing.assert_close(prepare(batch, recipe), expected, rtol=0, atol=NORMALISED_FRAMES)


def languagebind(batch, recipe):
    """The reference's order: normalise whole frames, interpolate, crop."""
    planes = batch.permute(0, 3, 1, 2) / 255.0
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.mean, recipe.std))
    planes = (planes - mean) / std
    height, width = planes.shape[-2:]
    size = recipe.short_side
    target = (int(height / width * size), size) if width < height else (size, int(width / height * size))
    planes = F.interpolate(planes, size=target, mode="bilinear", align_corners=False)
    top, left = (round((length - recipe.size) / 2.0) for length in target)
    return planes[..., top : top + recipe.size, left : left + recipe.size]


@pytest.mark.parametrize("shape", [(272, 640), (640, 272), (101, 57), (60, 61), (224, 224), (225, 224)], ids=str)
@pytest.mark.parametrize("resize", ["resize-naive", "letterbox"])
def test_languagebind_has_one_geometry(shape, resize):
    recipe = replace(RECIPES["languagebind"], resize=resize)
    batch = frames(2, *shape, 3)
    torch.testing.assert_close(prepare(batch, recipe), languagebind(batch, recipe), rtol=0, atol=NORMALISED_FRAMES)


@pytest.mark.parametrize(
    "recipe",
    [
        SMALL,
        replace(SMALL, resize="letterbox"),
        replace(SMALL, resize="resize-naive"),
        replace(SMALL, antialias=False),
    ],
    ids=["resize-crop", "letterbox", "resize-naive", "no-antialias"],
)
def test_leading_dimensions_and_strides(recipe, device):
    batch = frames(2, 3, 48, 85, 3)
    one_by_one = torch.stack([torch.stack([prepare(frame, recipe) for frame in clip]) for clip in batch])
    strided = batch.to(device).movedim(-1, -3).contiguous().movedim(-3, -1)
    assert strided.stride() != batch.stride()
    for view in (batch.to(device), strided):
        got = prepare(view, recipe)
        assert got.device == view.device
        assert torch.equal(got.cpu(), one_by_one)
    assert prepare(batch[:, :0], recipe).shape == (2, 0, 3, 32, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_result_dtype_is_rounded_once(dtype):
    batch = frames(2, 48, 85, 3)
    assert torch.equal(prepare(batch, SMALL, dtype), prepare(batch, SMALL).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_floating_point_frames_are_exact(dtype):
    every_level = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(16, 16, 3)
    assert torch.equal(prepare(every_level / torch.tensor(255, dtype=dtype), SMALL), prepare(every_level, SMALL))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.bool], ids=str)
def test_refuses_other_dtypes(dtype):
    with pytest.raises(TypeError, match=r"prepare: frames must be uint8, or float16, 32 or 64 in 0\.\.1, got"):
        prepare(frames(48, 85, 3).to(dtype), SMALL)


@pytest.mark.parametrize("value", [1.5, -0.5, float("nan")])
def test_refuses_values_outside_0_to_1(value):
    batch = frames(48, 85, 3) / 255.0
    batch[3, 4, 1] = value
    with pytest.raises(ValueError, match=r"prepare: floating-point frames must lie in 0\.\.1, got"):
        prepare(batch, SMALL)


@pytest.mark.parametrize("shape", [(3, 48, 85), (48, 3), (0, 85, 3)], ids=str)
def test_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"prepare: frames must be \[\.\.\., H, W, 3\], got shape"):
        prepare(frames(*shape), SMALL)


def step_by_step(batch, recipe, dtype):
    """Resize, cut or pad, then the arithmetic of the normalisation on every pixel."""
    size = (recipe.size, recipe.size)
    if recipe.resize != "resize-naive":
        if recipe.resize == "letterbox":
            batch = module.letterbox(batch, recipe.mean)
        size = module.short_side_to(recipe.short_side, *batch.shape[-3:-1])
    picture = module.pad(resample_frames(batch, size, recipe.method), recipe.size)
    top, left = (round((length - recipe.size) / 2) for length in picture.shape[-3:-1])
    planes = picture[..., top : top + recipe.size, left : left + recipe.size, :].movedim(-1, -3).contiguous()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.mean, recipe.std))
    return (((planes / 255) - mean) / std).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("short_side", [36, 27], ids=["cut", "padded"])
@pytest.mark.parametrize("resize", ["resize-naive", "letterbox", "resize-crop"])
def test_levels_change_no_bit_of_the_normalisation(resize, short_side, dtype):
    recipe = replace(SMALL, resize=resize, short_side=short_side)
    batch = frames(2, 48, 85, 3)
    assert torch.equal(prepare(batch, recipe, dtype), step_by_step(batch, recipe, dtype))


class Operators(TorchDispatchMode):
    """The names of those that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "recipe",
    [*(replace(SMALL, resize=resize, short_side=27) for resize in ("resize-naive", "letterbox", "resize-crop")), FLOAT],
    ids=["resize-naive", "letterbox", "resize-crop", "no antialiasing"],
)
def test_after_the_first_time_nothing_comes_from_the_host_or_goes_there(recipe, monkeypatch):
    """As a CUDA graph needs it."""
    monkeypatch.setattr(module, "_CONSTANTS", {})
    batch = frames(2, 48, 85, 3)
    host = {"lift_fresh", "lift_fresh_copy", "_local_scalar_dense", "scalar_tensor"}
    with Operators() as first:
        expected = prepare(batch, recipe, torch.float16)
    with Operators() as second:
        again = prepare(batch, recipe, torch.float16)
    assert first.names & host
    assert not second.names & host
    assert torch.equal(again, expected)


def test_constants_are_those_of_their_recipe_and_dtype(monkeypatch):
    monkeypatch.setattr(module, "_CONSTANTS", {})
    batch = frames(2, 48, 85, 3)
    others = [replace(SMALL, mean=SMALL.mean[::-1]), replace(SMALL, std=(0.25, 0.5, 0.125)), FLOAT]
    for recipe in (SMALL, *others, SMALL):
        for dtype in (torch.float32, torch.float16):
            got = prepare(batch, recipe, dtype)
            assert got.dtype == dtype
            if recipe is not FLOAT:
                assert torch.equal(got, step_by_step(batch, recipe, dtype))


@torch.inference_mode()
def prepared_in_inference_mode(batch):
    return prepare(batch, FLOAT)


def test_constants_made_in_inference_mode_serve_outside_of_it(monkeypatch):
    monkeypatch.setattr(module, "_CONSTANTS", {})
    batch = frames(1, 48, 85, 3)
    first = prepared_in_inference_mode(batch)
    assert all(not tensor.is_inference() for tensor in module._CONSTANTS.values())
    assert torch.equal(prepare(batch, FLOAT), first)


def test_what_a_tracer_makes_is_not_kept(monkeypatch):
    monkeypatch.setattr(module, "_CONSTANTS", {})
    with FakeTensorMode():
        prepare(torch.empty(1, 48, 85, 3, dtype=torch.uint8), SMALL)
    assert module._CONSTANTS == {}


def watched(monkeypatch):
    """The number of tables of each resampling from here on."""
    tables, resample = [], module.resample_normalise

    def counting(frames, size, method, crop, levels):
        tables.append(len(levels))
        return resample(frames, size, method, crop, levels)

    monkeypatch.setattr(module, "resample_normalise", counting)
    return tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_encoders_that_see_the_same_picture_share_its_resampling(monkeypatch, dtype):
    clip, counts = frames(2, 8, 48, 85, 3), {"languagebind": 4, "dinov2": 4, "vivit": 8, "siglip": 4}
    recipes = [replace(RECIPES[name], size=32, short_side=36) for name in counts]
    alone = [
        prepare(every(clip, count, dim=1), recipe, dtype)
        for recipe, count in zip(recipes, counts.values(), strict=True)
    ]
    tables = watched(monkeypatch)
    together = prepare_all(clip, recipes, list(counts.values()), dtype)
    assert tables == [2, 1]
    for got, expected in zip(together, alone, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("change", "resamplings"),
    [
        ({"mean": HALF[0], "std": HALF[1]}, 1),
        ({"resize": "letterbox"}, 2),
        ({"method": "bicubic"}, 2),
        ({"short_side": 40}, 2),
        ({"size": 30}, 2),
    ],
    ids=str,
)
def test_only_the_same_picture_is_shared(monkeypatch, change, resamplings):
    clip, recipes = frames(4, 48, 85, 3), [SMALL, replace(SMALL, **change)]
    alone = [prepare(clip, recipe) for recipe in recipes]
    tables = watched(monkeypatch)
    for got, expected in zip(prepare_all(clip, recipes, [4, 4]), alone, strict=True):
        assert torch.equal(got, expected)
    assert len(tables) == resamplings


def test_letterboxes_of_other_colours_are_not_shared():
    clip, black = frames(2, 48, 85, 3), replace(SMALL, resize="letterbox", mean=(0, 0, 0))
    recipes = [replace(black, mean=HALF[0]), black]
    for got, recipe in zip(prepare_all(clip, recipes, [2, 2]), recipes, strict=True):
        assert torch.equal(got, prepare(clip, recipe))


@pytest.mark.parametrize(
    ("shape", "counts", "message"),
    [
        ((48, 85, 3), [1, 1], r"prepare_all: frames must be \[\.\.\., F, H, W, 3\], got shape \(48, 85, 3\)"),
        ((4, 48, 85), [1, 1], r"prepare: frames must be \[\.\.\., H, W, 3\], got shape \(4, 48, 85\)"),
        ((4, 48, 85, 3), [4], r"prepare_all: num_frames must be 2 numbers like recipes, got 1"),
        ((4, 48, 85, 3), [4, 3], r"every: count must divide the 4 frames, got 3"),
    ],
)
def test_prepare_all_says_what_is_wrong(shape, counts, message):
    with pytest.raises(ValueError, match=message):
        prepare_all(frames(*shape), [SMALL, SMALL], counts)


def test_recipe_survives_json():
    recipe = RECIPES["languagebind"]
    assert Recipe(**json.loads(json.dumps(asdict(recipe)))) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "Recipe: size must be at least 1, got 0"),
        (
            {"resize": "stretch"},
            "Recipe: resize must be one of resize-naive, letterbox, resize-crop, got 'stretch'",
        ),
        ({"method": "nearest"}, "Recipe: method must be one of bicubic, bilinear, got 'nearest'"),
        ({"mean": (0.5,)}, r"Recipe: mean must have 3 values, got \(0.5,\)"),
        ({"antialias": False, "method": "bicubic"}, "Recipe: without antialias, method must be 'bilinear'"),
        ({"antialias": False, "short_side": 20}, "got 'bilinear' and 20 < 32"),
    ],
)
def test_recipe_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)
