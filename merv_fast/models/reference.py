"""The reference's run directories: ``config.json`` and ``checkpoints/latest-checkpoint.pt``, read as ours.

Source: ``merv/models/load_vid.py``, ``merv/conf/models.py`` and ``MERV.from_pretrained`` of the reference.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from merv_fast.encoders import AnyEncoderConfig
from merv_fast.errors import CheckpointError
from merv_fast.models.configuration import MERV_BASE, MervConfig, MervEncoderConfig
from merv_fast.models.llms import language_model
from merv_fast.modules import convert_fusion_state_dict

__all__ = ["CHECKPOINT", "CONFIG", "is_run_directory", "merv_config", "read_checkpoint", "read_json", "read_run_config"]

CONFIG = "config.json"
CHECKPOINT = "checkpoints/latest-checkpoint.pt"

DEFAULTS: dict[str, Any] = {
    "model_id": "merv-base",
    "arch_specifier": "no-align+3davg+linear",
    "feature_fusion": "cross_attention_avg_lq",
    "video_backbone_ids": list(MERV_BASE),
    "llm_backbone_id": "llama2-7b-pure",
    "image_resize_strategy": "resize-naive",
    "llm_max_length": 2048,
    "num_frames": list(MERV_BASE.values()),
    "projector_token_length": 64,
}
"""merv-base, whose values stand for those that a run's configuration leaves out."""


def is_run_directory(path: Path) -> bool:
    """Whether ``path`` looks like a run directory of the reference rather than one of ours."""
    config = path / CONFIG
    return config.is_file() and "model" in read_json(config)


def read_run_config(config_json: Path) -> dict[str, Any]:
    """The ``model`` section of a run's ``config.json``, with merv-base's values for what it leaves out.

    ``num_frames``, once one number for all encoders, comes back as one for each of ``video_backbone_ids``.
    """
    run = read_json(config_json)["model"]
    if not isinstance(run, dict):
        raise CheckpointError(f"{config_json}: model must be an object, got {run!r}")
    run = DEFAULTS | run
    encoders, frames = run["video_backbone_ids"], run["num_frames"]
    if isinstance(frames, int):
        frames = [frames] * len(encoders)
    if len(frames) < len(encoders):
        raise CheckpointError(f"{config_json}: num_frames must be one for each of {encoders}, got {frames}")
    # The reference pairs them up and leaves numbers without an encoder aside.
    return run | {"num_frames": frames[: len(encoders)]}


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint under our names, memory-mapped: nothing is read until it is used.

    Returns:
        ``video_model.tail.projectors.*``, ``video_model.tail.fusion.*`` and ``language_model.*``.

    Raises:
        CheckpointError: the file is not a checkpoint of the reference, or holds groups that are not known.
    """
    try:
        groups = dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["model"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of the reference ({error})") from error
    if "projector" in groups:
        groups["projectors"] = {f"0.{key}": value for key, value in groups.pop("projector").items()}
    adapter = groups.pop("adapter", {})
    groups.setdefault("feature_fusion", adapter)
    if missing := {"projectors", "llm_backbone"} - set(groups):
        raise CheckpointError(f"{path}: missing groups {', '.join(sorted(missing))}; it holds {', '.join(groups)}")
    # The reference freezes its encoders, reads them from the hub, and does not look at this group.
    groups.pop("video_backbone", None)
    if unknown := {name for name in groups if groups[name]} - {"projectors", "llm_backbone", "feature_fusion"}:
        raise CheckpointError(f"{path}: unknown groups {', '.join(sorted(unknown))}")
    fusion = convert_fusion_state_dict(groups["feature_fusion"])
    return (
        _prefixed("video_model.tail.projectors.", groups["projectors"])
        | _prefixed("video_model.tail.fusion.", fusion)
        | _prefixed("language_model.", _without_prefix(groups["llm_backbone"], "llm.", path))
    )


def merv_config(
    run: Mapping[str, Any],
    encoders: Mapping[str, AnyEncoderConfig],
    text_config: PreTrainedConfig,
    video_token_id: int,
    tensors: Mapping[str, Tensor],
) -> MervConfig:
    """Our configuration of a run.

    Args:
        run: from ``read_run_config``.
        encoders: configuration of each encoder by name, in the run's order.
        text_config: of the language model; its vocabulary becomes that of the checkpoint's embedding.
        video_token_id: id of the placeholder.
        tensors: from ``read_checkpoint``, for the widths that a run's configuration leaves out.
    """
    embedding = tensors.get("language_model.model.embed_tokens.weight")
    if embedding is not None:
        text_config.vocab_size = embedding.shape[0]
    query = tensors.get("video_model.tail.fusion.Q")
    return MervConfig(
        encoders=list(encoders),
        text_config=text_config,
        arch_specifier=run["arch_specifier"],
        feature_fusion=run["feature_fusion"],
        projector_token_length=run["projector_token_length"],
        fusion_query_width=3072 if query is None else query.shape[-1],
        fusion_positional_embedding="video_model.tail.fusion.pe" in tensors,
        prompt_format=language_model(run["llm_backbone_id"]).prompt_format,
        video_token_id=video_token_id,
        max_text_length=run["llm_max_length"],
        model_id=run["model_id"],
        **{f"{name}_config": MervEncoderConfig.from_encoder(config) for name, config in encoders.items()},
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold an object, got {type(values).__name__}")
    return values


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    if unknown := [key for key in tensors if not key.startswith(prefix)]:
        raise CheckpointError(f"{path}: unknown keys in llm_backbone: {', '.join(unknown)}")
    # Older LLaMA checkpoints store the rotary frequencies, which are computed.
    return {key.removeprefix(prefix): t for key, t in tensors.items() if not key.endswith("rotary_emb.inv_freq")}
