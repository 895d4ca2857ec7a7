"""The encoders by the reference's ids: configuration, module, conversion of checkpoints."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from torch import Tensor, nn

from merv_fast.encoders.config import EncoderConfig
from merv_fast.encoders.dinov2 import DINOV2_ENCODERS, DINOV2_NAMINGS, dinov2_config
from merv_fast.encoders.hiera import HIERA_ENCODERS, Hiera, HieraConfig, convert_hiera, hiera_config
from merv_fast.encoders.languagebind import LANGUAGEBIND_ENCODERS, LANGUAGEBIND_NAMINGS, languagebind_config
from merv_fast.encoders.naming import Naming, convert
from merv_fast.encoders.siglip import SIGLIP_ENCODERS, SIGLIP_NAMINGS, SIGLIP_REFUSED, siglip_config
from merv_fast.encoders.vit import VisionTransformer
from merv_fast.encoders.vivit import VIVIT_ENCODERS, VIVIT_NAMINGS, vivit_config
from merv_fast.video.prepare import Recipe

__all__ = [
    "AnyEncoderConfig",
    "available_encoders",
    "build_encoder",
    "config_from_dict",
    "config_to_dict",
    "convert_state_dict",
    "encoder_config",
]

AnyEncoderConfig = EncoderConfig | HieraConfig


class Family(NamedTuple):
    """What the registry knows of one encoder family."""

    encoders: Iterable[str]
    config: Callable[[str, int, str], AnyEncoderConfig]
    namings: tuple[Naming, ...] = ()
    refused: Mapping[str, str] = {}


FAMILIES: dict[str, Family] = {
    "languagebind": Family(LANGUAGEBIND_ENCODERS, languagebind_config, LANGUAGEBIND_NAMINGS),
    "dinov2": Family(DINOV2_ENCODERS, dinov2_config, DINOV2_NAMINGS),
    "vivit": Family(VIVIT_ENCODERS, vivit_config, VIVIT_NAMINGS),
    "siglip": Family(SIGLIP_ENCODERS, siglip_config, SIGLIP_NAMINGS, SIGLIP_REFUSED),
    "hiera": Family(HIERA_ENCODERS, hiera_config),
}


def available_encoders() -> list[str]:
    """Ids of every encoder, by family.

    Example:
        >>> "siglip-vit-so400m" in available_encoders()
        True
    """
    return [encoder_id for family in FAMILIES.values() for encoder_id in family.encoders]


def encoder_config(encoder_id: str, num_frames: int, resize: str = "resize-naive") -> AnyEncoderConfig:
    """Configuration of an encoder by the reference's id.

    Args:
        encoder_id: one of ``available_encoders()``.
        num_frames: frames it is given.
        resize: ``resize-naive``, ``letterbox`` or ``resize-crop``.

    Raises:
        ValueError: the id is unknown or the reference fails on it, or the frames or the resizing do not fit.

    Example:
        >>> config = encoder_config("dinov2-video-all-tokens", 16)
        >>> config.slots, config.grid, config.width, config.blocks
        (16, (16, 16), 1024, 23)

    Source: ``VIDEO_BACKBONES`` of the reference's ``merv/models/materialize.py``.
    """
    for family in FAMILIES.values():
        if encoder_id in family.encoders:
            return family.config(encoder_id, num_frames, resize)
        if encoder_id in family.refused:
            rule = f"one that the reference can run ({family.refused[encoder_id]})"
            raise ValueError(f"encoder_config: encoder_id must be {rule}, got {encoder_id!r}")
    raise ValueError(f"encoder_config: encoder_id must be one of {available_encoders()}, got {encoder_id!r}")


def config_to_dict(config: AnyEncoderConfig) -> dict[str, Any]:
    """``config`` as plain values for JSON."""
    values = asdict(config)
    return values if isinstance(config, EncoderConfig) else {"family": "hiera", **values}


def config_from_dict(values: Mapping[str, Any]) -> AnyEncoderConfig:
    """The configuration that ``config_to_dict`` wrote, perhaps through JSON.

    Raises:
        ValueError: a field is unknown, missing or out of its range.
    """
    if values.get("family") != "hiera":
        return EncoderConfig.from_dict(values)
    fields = {key: value for key, value in values.items() if key != "family"}
    try:
        recipe = Recipe(**fields.pop("recipe"))
        return HieraConfig(**{**fields, "stages": tuple(fields["stages"]), "recipe": recipe})
    except (KeyError, TypeError) as error:
        raise ValueError(f"hiera: keys must be the fields of HieraConfig, got {sorted(values)}") from error


def build_encoder(config: AnyEncoderConfig) -> nn.Module:
    """The module of ``config`` with random weights: ``[B, F, 3, S, S]`` -> ``[B, T, N, C]``."""
    return Hiera(config) if isinstance(config, HieraConfig) else VisionTransformer(config)


def convert_state_dict(config: AnyEncoderConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of ``build_encoder(config)`` from a checkpoint of any known naming, told by its keys.

    Known are timm's names, alone or inside open_clip, those of every version of transformers, LanguageBind's,
    Hiera's and ours. Blocks that are not run, heads that are not used and text towers are dropped; position
    embeddings are resampled to the configuration's grid.

    Raises:
        CheckpointError: keys are unknown, missing or misshapen; the message lists them.
    """
    if isinstance(config, HieraConfig):
        return convert_hiera(config, tensors)
    return convert(config, tensors, FAMILIES[config.family].namings)
