"""From decoded frames to the input of one encoder."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from merv_fast.ops import resample_frames, resample_normalise
from merv_fast.video.sampling import every

__all__ = ["Recipe", "prepare", "prepare_all"]

RESIZES = ("resize-naive", "letterbox", "resize-crop")
METHODS = ("bicubic", "bilinear")


@dataclass(frozen=True)
class Recipe:
    """How one encoder wants its frames; JSON-able through `dataclasses.asdict`.

    Args:
        size: Side of the square that the encoder sees.
        short_side: Length that letterbox and resize-crop (and ``antialias=False``) give the short side
            before the centre is cut out; Hiera has 256 here, the others ``size``.
        resize: "resize-naive" (straight to the square), "letterbox" (pad to a square with the mean colour,
            then as resize-crop) or "resize-crop" (short side to ``short_side``, then the centre).
        method: "bicubic" or "bilinear".
        antialias: True resizes 8-bit frames as Pillow does and normalises afterwards. False is LanguageBind's
            way: normalise, resize in floating point without antialiasing, cut out the centre. It has only
            one geometry, so ``resize`` is not looked at.
        mean: Per channel, of values in 0..1.
        std: Per channel, of values in 0..1.

    Raises:
        ValueError: A field is out of its range.
    """

    size: int
    short_side: int
    resize: str
    method: str
    antialias: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        """Check the fields; lists, as JSON gives them, become tuples."""
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != 3:
                raise ValueError(f"Recipe: {name} must have 3 values, got {values}")
            object.__setattr__(self, name, values)
        for name in ("size", "short_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"Recipe: {name} must be at least 1, got {getattr(self, name)}")
        if self.resize not in RESIZES:
            raise ValueError(f"Recipe: resize must be one of {', '.join(RESIZES)}, got {self.resize!r}")
        if self.method not in METHODS:
            raise ValueError(f"Recipe: method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if not self.antialias and (self.method != "bilinear" or self.short_side < self.size):
            raise ValueError(
                "Recipe: without antialias, method must be 'bilinear' and short_side at least size, "
                f"got {self.method!r} and {self.short_side} < {self.size}"
            )

    @property
    def picture(self) -> tuple[object, ...]:
        """What the 8-bit picture depends on: recipes that agree in it differ only in mean and std."""
        if not self.antialias:
            return (self,)
        if self.resize == "resize-naive":
            return self.resize, self.size, self.method
        border = fill_colour(self.mean) if self.resize == "letterbox" else None
        return self.resize, self.size, self.method, self.short_side, border


def prepare(frames: Tensor, recipe: Recipe, dtype: torch.dtype = torch.float32) -> Tensor:
    """Resize, crop and normalise frames for one encoder.

    Args:
        frames: uint8 [..., H, W, 3], any strides, any device. float16, float32 and float64 in 0..1 are
            accepted too and rounded to the nearest of the 256 levels, which is exact for u / 255.
        recipe: The encoder's.
        dtype: Of the result; the arithmetic is float32.

    Returns:
        [..., 3, size, size] on the device of ``frames``, contiguous.

    Raises:
        TypeError: Another dtype (bfloat16 cannot tell 256 levels apart).
        ValueError: Not [..., H, W, 3], or floating-point values outside 0..1.

    Source: the image transforms of MERV's encoders, which are torchvision's Resize, CenterCrop, ToTensor and
    Normalize on PIL pictures; pytorchvideo's short-side scaling for LanguageBind.

    >>> half = (0.5, 0.5, 0.5)
    >>> recipe = Recipe(224, 224, "resize-naive", "bicubic", antialias=True, mean=half, std=half)
    >>> prepare(torch.full((16, 272, 640, 3), 255, dtype=torch.uint8), recipe)[:, :, 0, 0].unique()
    tensor([1.])
    """
    check_frames(frames)
    return prepare_alike(frames, [recipe], dtype)[0]


def prepare_all(
    frames: Tensor, recipes: Sequence[Recipe], num_frames: Sequence[int], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Every encoder's input from the same frames; encoders that see the same picture share its resampling.

    Args:
        frames: [..., F, H, W, 3], otherwise as for ``prepare``.
        recipes: One for each encoder.
        num_frames: How many of the F frames each encoder takes, evenly; must divide F.
        dtype: Of the results.

    Returns:
        For each encoder what ``prepare`` gives for its frames: [..., num_frames, 3, size, size].

    Raises:
        TypeError: As for ``prepare``.
        ValueError: As for ``prepare``; or ``num_frames`` does not divide F or is not one number for each recipe.

    >>> half = (0.5, 0.5, 0.5)
    >>> recipe = Recipe(224, 224, "resize-naive", "bicubic", antialias=True, mean=half, std=half)
    >>> [x.shape for x in prepare_all(torch.zeros(32, 272, 640, 3, dtype=torch.uint8), [recipe] * 2, [16, 32])]
    [torch.Size([16, 3, 224, 224]), torch.Size([32, 3, 224, 224])]
    """
    check_frames(frames)
    if frames.ndim < 4:
        raise ValueError(f"prepare_all: frames must be [..., F, H, W, 3], got shape {tuple(frames.shape)}")
    if len(num_frames) != len(recipes):
        raise ValueError(f"prepare_all: num_frames must be {len(recipes)} numbers like recipes, got {len(num_frames)}")
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, (recipe, count) in enumerate(zip(recipes, num_frames, strict=True)):
        alike.setdefault((count, recipe.picture), []).append(index)
    prepared: dict[int, Tensor] = {}
    for members in alike.values():
        own = every(frames, num_frames[members[0]], dim=-4)
        prepared |= zip(members, prepare_alike(own, [recipes[index] for index in members], dtype), strict=True)
    return [prepared[index] for index in range(len(recipes))]


def check_frames(frames: Tensor) -> None:
    """Raise ValueError unless frames are [..., H, W, 3]."""
    if frames.ndim < 3 or frames.shape[-1] != 3 or 0 in frames.shape[-3:]:
        raise ValueError(f"prepare: frames must be [..., H, W, 3], got shape {tuple(frames.shape)}")


def prepare_alike(frames: Tensor, recipes: Sequence[Recipe], dtype: torch.dtype) -> list[Tensor]:
    """``prepare`` with several recipes whose ``picture`` is the same."""
    frames, recipe = to_uint8(frames), recipes[0]
    if not recipe.antialias:
        return [scale_float(frames, recipe).to(dtype) for recipe in recipes]
    size, offset = (recipe.size, recipe.size), (0, 0)
    if recipe.resize == "letterbox":
        frames = letterbox(frames, recipe.mean)
    if recipe.resize != "resize-naive":
        size = short_side_to(recipe.short_side, *frames.shape[-3:-1])
        if min(size) < recipe.size:
            frames = pad(resample_frames(frames, size, recipe.method), recipe.size)
            size = (frames.shape[-3], frames.shape[-2])
        offset = (crop_offset(size[0], recipe.size), crop_offset(size[1], recipe.size))
    crop = (*offset, recipe.size, recipe.size)
    levels = [normalised_levels(recipe, frames.device, dtype) for recipe in recipes]
    return resample_normalise(frames, size, recipe.method, crop, levels)


def to_uint8(frames: Tensor) -> Tensor:
    """The 256 levels of ``frames``, rounded to nearest if they are floating point in 0..1."""
    if frames.dtype == torch.uint8:
        return frames
    if frames.dtype not in (torch.float16, torch.float32, torch.float64):
        raise TypeError(f"prepare: frames must be uint8, or float16, 32 or 64 in 0..1, got {frames.dtype}")
    if frames.numel():
        low, high = (value.item() for value in frames.aminmax())
        # The negation also catches NaN.
        if not (low >= 0 and high <= 1):
            raise ValueError(f"prepare: floating-point frames must lie in 0..1, got {low} to {high}")
    return (frames * 255).round().to(torch.uint8)


def letterbox(frames: Tensor, mean: tuple[float, float, float]) -> Tensor:
    """Pad [..., H, W, 3] with the mean colour by the same whole number of pixels on both sides.

    An odd difference thus leaves the result one pixel from square, as in the reference.
    """
    height, width = frames.shape[-3:-1]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    out = frames.new_empty(*frames.shape[:-3], height + 2 * top, width + 2 * left, 3)
    for channel, level in zip(out.unbind(-1), fill_colour(mean), strict=True):
        channel.fill_(level)
    out[..., top : top + height, left : left + width, :] = frames
    return out


def fill_colour(mean: tuple[float, float, float]) -> tuple[int, ...]:
    """The 8-bit mean colour, rounded down."""
    return tuple(int(value * 255) for value in mean)


def short_side_to(length: int, height: int, width: int) -> tuple[int, int]:
    """The (height, width) of torchvision's ``Resize(length)``."""
    if width <= height:
        return int(length * height / width), length
    return length, int(length * width / height)


def pad(frames: Tensor, size: int) -> Tensor:
    """Black around [..., H, W, 3] up to sides of ``size``; an odd row or column goes below or to the right."""
    height, width = frames.shape[-3:-1]
    tall, wide = max(size - height, 0), max(size - width, 0)
    return F.pad(frames, (0, 0, wide // 2, (wide + 1) // 2, tall // 2, (tall + 1) // 2))


def crop_offset(length: int, size: int) -> int:
    """First row or column of a centre crop; halves go to the even number, as in torchvision."""
    return round((length - size) / 2)


def normalise(planes: Tensor, recipe: Recipe) -> Tensor:
    """uint8 [..., 3, h, w] -> float32, in the reference's order of operations."""
    out = planes.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    mean, std = (channels(values, out.device) for values in (recipe.mean, recipe.std))
    return out.sub_(mean).div_(std)


def channels(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """``values`` as float32 [3, 1, 1]."""
    return constant((values, device), lambda: torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1))


def normalised_levels(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What ``normalise`` makes of each of the 256 levels, rounded to ``dtype``, [3, 256]."""

    def made() -> Tensor:
        levels = torch.arange(256, dtype=torch.uint8, device=device).expand(3, 1, 256)
        return normalise(levels, recipe)[:, 0].to(dtype)

    return constant((recipe.mean, recipe.std, device, dtype), made)


_CONSTANTS: dict[Hashable, Tensor] = {}


def constant(key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """What ``make`` gives, made once for each ``key`` and never freed: a CUDA graph may read it, and not make it."""
    if torch.compiler.is_compiling():
        return make()
    if key not in _CONSTANTS:
        with torch.inference_mode(False):
            made = make()
        if type(made) is not Tensor:  # but one that only stands for what a tracer follows
            return made
        if made.is_cuda:
            # Streams that have not waited for this one read it too.
            torch.cuda.current_stream(made.device).synchronize()
        _CONSTANTS[key] = made
    return _CONSTANTS[key]


def scale_float(frames: Tensor, recipe: Recipe) -> Tensor:
    """LanguageBind's path: short side to ``short_side``, the other rounded down, then the centre square.

    Each output pixel reads four input pixels, so only those are gathered and normalised: the result is that
    of normalising whole frames, at a fraction of the memory. On a CPU one frame after another, which caches hold.
    """
    height, width = frames.shape[-3:-1]
    long_side = math.floor(max(height, width) / min(height, width) * recipe.short_side)
    tall, wide = (long_side, recipe.short_side) if width < height else (recipe.short_side, long_side)
    rows, down = taps(height, tall, recipe.size, frames.device)
    columns, right = taps(width, wide, recipe.size, frames.device)
    stack = frames.reshape(-1, height, width, 3)
    out = torch.empty(len(stack), 3, recipe.size, recipe.size, dtype=torch.float32, device=frames.device)
    step = 1 if frames.device.type == "cpu" else max(len(stack), 1)
    for part, target in zip(stack.split(step), out.split(step), strict=True):
        planes = normalise(part.index_select(-3, rows).index_select(-2, columns).movedim(-1, -3), recipe)
        planes = planes.unflatten(-2, (2, recipe.size))
        planes = torch.lerp(planes[..., 0, :, :], planes[..., 1, :, :], down[:, None])
        planes = planes.unflatten(-1, (2, recipe.size))
        torch.lerp(planes[..., 0, :], planes[..., 1, :], right, out=target)
    return out.view(*frames.shape[:-3], 3, recipe.size, recipe.size)


def taps(length: int, target: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the central ``size`` of ``target`` positions read: sources [2 * size], the second's weight."""
    start = crop_offset(target, size)
    positions = torch.arange(start, start + size, dtype=torch.float64, device=device)
    # In float64 from a float32 scale, then rounded once: what torch's kernels get from a fused multiply-add.
    scale = float(np.float32(length / target))
    source = ((positions + 0.5) * scale - 0.5).clamp_(min=0).float()
    first = source.long().clamp_(max=length - 1)
    return torch.cat([first, (first + 1).clamp_(max=length - 1)]), source - first
