"""From the names of any known source to ours: read, check, fold."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from merv_fast.encoders.config import EncoderConfig
from merv_fast.encoders.positions import resample_positions
from merv_fast.encoders.vit import VisionTransformer
from merv_fast.errors import CheckpointError

__all__ = ["OURS", "Naming", "convert"]

Shape = tuple[int, ...]

LAYER_SUFFIXES = ("", ".weight", ".bias")


@dataclass(frozen=True)
class Naming:
    """How one source names the tensors of an encoder.

    Args:
        source: what people call it.
        prefixes: what may stand before the vision tower's keys; the first that has ``signature`` counts.
        signature: a key that tells this source from the others.
        names: their layer or tensor to our part, ``{}`` standing for the block's number.
        unused: regular expression of keys, prefix included, that no encoder here needs.
        packed: whether query, key and value are one layer.
        class_position: whether the first position is the class token's.
        patch_bias: whether the patch projection has a bias.
    """

    source: str
    prefixes: tuple[str, ...]
    signature: str
    names: Mapping[str, str]
    unused: str
    packed: bool = False
    class_position: bool = False
    patch_bias: bool = True

    def prefix(self, keys: Iterable[str]) -> str | None:
        """The prefix under which these keys follow this naming, or None."""
        present = set(keys)
        return next((prefix for prefix in self.prefixes if prefix + self.signature in present), None)

    def part(self, key: str) -> str | None:
        """Our part of a key without its prefix, or None; without ``names`` every key is its own part."""
        if not self.names:
            return key
        number = re.search(r"\.(\d+)\.", key)
        template = key[: number.start()] + ".{}." + key[number.end() :] if number else key
        for suffix in LAYER_SUFFIXES:
            ours = self.names.get(template.removesuffix(suffix)) if template.endswith(suffix) else None
            if ours is not None:
                return ours.format(number.group(1) if number else "") + suffix
        return None


OURS = Naming(source="merv_fast", prefixes=("",), signature="patch.weight", names={}, unused=r"(?!)")


def convert(config: EncoderConfig, tensors: Mapping[str, Tensor], namings: Iterable[Naming]) -> dict[str, Tensor]:
    """State dict of ``VisionTransformer(config)`` from tensors named by one of ``namings`` or by us.

    Raises:
        CheckpointError: no naming fits, or keys are unknown, missing or misshapen; the message lists them.
    """
    naming, prefix = _detect(config, tensors, (OURS, *namings))
    with torch.device("meta"):
        wanted = {key: tuple(value.shape) for key, value in VisionTransformer(config).state_dict().items()}
    parts, keys, unknown = _read(config, tensors, naming, prefix)
    if naming is not OURS:
        wanted = _unfolded(config, wanted, naming)
        parts = {part: _squeeze(value, len(wanted.get(part, value.shape))) for part, value in parts.items()}
    misshapen = [
        f"{keys.get(part, part)} {list(value.shape)} for {list(wanted[part])}"
        for part, value in parts.items()
        if part in wanted
        and tuple(value.shape) != wanted[part]
        and not (part == "position" and _resamples(config, naming, value))
    ]
    problems = {
        "unknown": sorted([*unknown, *(keys.get(part, part) for part in parts.keys() - wanted.keys())]),
        "missing": sorted(wanted.keys() - parts.keys()),
        "misshapen": sorted(misshapen),
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys)
        raise CheckpointError(f"convert_state_dict: {naming.source} tensors must match {config.name}, got {listed}")
    return parts if naming is OURS else _fold(config, parts)


def _detect(config: EncoderConfig, tensors: Mapping[str, Tensor], namings: Iterable[Naming]) -> tuple[Naming, str]:
    sources = []
    for naming in namings:
        prefix = naming.prefix(tensors)
        if prefix is not None:
            return naming, prefix
        sources.append(naming.source)
    first = ", ".join(sorted(tensors)[:5]) or "no keys"
    raise CheckpointError(
        f"convert_state_dict: tensors of {config.family} must be named by one of {sources}, got {first}"
    )


def _read(
    config: EncoderConfig, tensors: Mapping[str, Tensor], naming: Naming, prefix: str
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Parts by our names, not yet folded; the key each came under; and the keys that nobody knows."""
    parts: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    unknown = []
    for key, value in tensors.items():
        bare = key.removeprefix(prefix)
        part = naming.part(bare) if key.startswith(prefix) else None
        if part is not None:
            if not _left_out(config, part):
                parts[part], keys[part] = value, key
        elif not re.match(naming.unused, bare):
            unknown.append(key)
    if naming.class_position and "position" in parts and parts["position"].dim() > 1:
        rows = parts["position"].flatten(0, -2)
        parts["class_position"], parts["position"] = rows[0], rows[1:]
    for leaf in ("weight", "bias"):
        if f"pool.qkv.{leaf}" in parts:
            packed = parts.pop(f"pool.qkv.{leaf}")
            parts[f"pool.q.{leaf}"], parts[f"pool.kv.{leaf}"] = packed[: config.width], packed[config.width :]
    return parts, keys, unknown


def _left_out(config: EncoderConfig, part: str) -> bool:
    """Whether the checkpoint rightly has this part and the configuration does without it."""
    block = re.match(r"blocks\.(\d+)\.", part)
    if block:
        return config.blocks <= int(block.group(1)) < config.depth
    return (part.startswith("norm.") and not config.final_norm) or (
        part.startswith("pool.") and config.tokens != "pooled"
    )


def _unfolded(config: EncoderConfig, wanted: Mapping[str, Shape], naming: Naming) -> dict[str, Shape]:
    """Shapes of the parts which a source holds apart; a position embedding may have another grid."""
    width = config.width
    shapes: dict[str, Shape] = {}
    for key, shape in wanted.items():
        if ".qkv." in key and not naming.packed:
            shapes |= {key.replace(".qkv.", f".{part}."): (width, *shape[1:]) for part in "qkv"}
        elif key == "patch.weight":
            tubelet = (config.tubelet,) if config.tubelet > 1 else ()
            shapes[key] = (width, 3, *tubelet, config.patch, config.patch)
        elif key == "pool.query":
            shapes |= {"pool.latent": (width,), "pool.q.weight": (width, width), "pool.q.bias": (width,)}
        elif key != "prefix":
            shapes[key] = shape
    if naming.patch_bias:
        shapes["patch.bias"] = (width,)
    if naming.class_position:
        shapes["class_position"] = (width,)
    if config.class_token:
        shapes["class"] = (width,)
    if config.register_tokens:
        shapes["registers"] = (config.register_tokens, width)
    return shapes


def _resamples(config: EncoderConfig, naming: Naming, position: Tensor) -> bool:
    """Whether positions of another grid can be resampled to the configuration's."""
    if position.dim() != 2 or position.shape[1] != config.width:
        return False
    square = isqrt(len(position)) ** 2 == len(position) > 0
    return square and config.attention == "frame" and naming is not OURS


def _squeeze(value: Tensor, dims: int) -> Tensor:
    """Without leading dimensions of size 1, down to ``dims`` dimensions."""
    while value.dim() > dims and value.shape[0] == 1:
        value = value[0]
    return value


def _fold(config: EncoderConfig, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters from checked parts; sums and products are taken in float32 at least."""
    state = dict(parts)
    for key in [key for key in parts if ".q." in key and not key.startswith("pool.")]:
        stacked = [state.pop(key.replace(".q.", f".{part}.")) for part in "qkv"]
        state[key.replace(".q.", ".qkv.")] = _stack(stacked)
    state["patch.weight"] = state["patch.weight"].flatten(1)
    position = state["position"]
    if config.attention == "frame":
        position = resample_positions(position, config.patch_grid)
    if "patch.bias" in state:
        position = _wide(position) + state.pop("patch.bias")
    state["position"] = position.to(parts["position"].dtype)
    prefix = []
    if "class" in state:
        token = state.pop("class").unsqueeze(0)
        if "class_position" in state:
            token = (_wide(token) + state.pop("class_position")).to(token.dtype)
        prefix.append(token)
    if "registers" in state:
        prefix.append(state.pop("registers"))
    if prefix:
        state["prefix"] = torch.cat(prefix)
    if "pool.latent" in state:
        latent = state.pop("pool.latent")
        query = _wide(state.pop("pool.q.weight")) @ _wide(latent) + state.pop("pool.q.bias")
        state["pool.query"] = query.to(latent.dtype)
    return state


def _stack(parts: list[Tensor]) -> Tensor:
    """The parts one below the other; not copied where they lie like this in memory already."""
    first, place = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and part.is_contiguous() and part.storage_offset() == place and part.dtype == first.dtype):
            return torch.cat(parts)
        place += part.numel()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
