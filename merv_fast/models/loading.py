"""load_vid: a model by name or path, from the reference's files or ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from merv_fast.encoders import AnyEncoderConfig, encoder_config
from merv_fast.errors import CheckpointError
from merv_fast.models.chat_templates import chat_template
from merv_fast.models.configuration import encoder_names
from merv_fast.models.llms import LanguageModel, language_model
from merv_fast.models.merv_model import MervModel
from merv_fast.models.modeling import MervForConditionalGeneration
from merv_fast.models.processing import MervProcessor, MervVideoProcessor
from merv_fast.models.reference import (
    CHECKPOINT,
    CONFIG,
    is_run_directory,
    merv_config,
    read_checkpoint,
    read_json,
    read_run_config,
)
from merv_fast.models.sources import MODELS, Sources

__all__ = ["TINY", "available_models", "load_vid"]

ASSETS = Path(__file__).parent.parent / "assets"
TINY = "merv-tiny"


def available_models() -> list[str]:
    """Names that ``load_vid`` knows without a path: the reference's published models and the bundled ``merv-tiny``."""
    return [TINY, *MODELS]


def load_vid(
    model_id_or_path: str | Path,
    hf_token: str | None = None,
    cache_dir: str | Path | None = None,
    get_model_cfg: bool = False,
    *,
    dtype: torch.dtype | None = None,
    llm_path: str | Path | None = None,
    encoder_paths: Mapping[str, str | Path] | None = None,
    encoder_configs: Mapping[str, AnyEncoderConfig] | None = None,
) -> Any:
    """Load a model for inference; its weights are memory-mapped, so the file is the only copy in memory.

    Args:
        model_id_or_path: a run directory of the reference (``config.json`` and ``checkpoints/latest-checkpoint.pt``),
            a directory of ours (``MervModel.save_pretrained``, ``merv-fast convert``), one of ``available_models()``,
            or the hub id of a repository in our format.
        hf_token: token for gated repositories.
        cache_dir: folder for downloads.
        get_model_cfg: also return the model's configuration, as the reference can.
        dtype: type of the weights, default that of the checkpoint's language model.
        llm_path: folder with the language model's ``config.json`` and tokenizer, instead of the hub.
        encoder_paths: weights of each encoder by the reference's encoder id, instead of the hub.
        encoder_configs: configuration of encoders that are not the published ones, by the reference's encoder id.

    Returns:
        A ``MervModel``, or ``(MervModel, MervConfig)`` with ``get_model_cfg``.

    Raises:
        CheckpointError: the weights are not those of the model; the message lists the keys.
        ValueError: no such model.
    """
    sources = Sources(hf_token, cache_dir, llm_path, encoder_paths or {}, encoder_configs or {})
    path = Path(model_id_or_path)
    if str(model_id_or_path) and path.is_dir():
        if is_run_directory(path):
            vidlm = _load_run(path / CONFIG, path / CHECKPOINT, sources, dtype)
        else:
            vidlm = _load_ours(path, sources, dtype)
    elif str(model_id_or_path) == TINY:
        vidlm = _load_ours(ASSETS / TINY, sources, dtype)
    elif (model_id := _published(str(model_id_or_path))) is not None:
        vidlm = _load_run(*sources.run_files(model_id), sources, dtype)
    elif str(model_id_or_path).count("/") == 1 and str(model_id_or_path)[0] not in "./~":
        vidlm = _load_ours(str(model_id_or_path), sources, dtype)
    else:
        raise ValueError(
            f"load_vid: model_id_or_path must be a directory, a hub id or one of {', '.join(available_models())}, "
            f"got {str(model_id_or_path)!r}"
        )
    return (vidlm, vidlm.config) if get_model_cfg else vidlm


def _published(name: str) -> str | None:
    """The id of a published model by id or title."""
    return next((model_id for model_id, title in MODELS.items() if name in (model_id, title)), None)


def _load_ours(path: str | Path, sources: Sources, dtype: torch.dtype | None) -> MervModel:
    if sources.llm_path or sources.encoder_paths or sources.encoder_configs:
        rule = "left out for a model in our format, which holds all its parts"
        raise ValueError(f"load_vid: llm_path, encoder_paths and encoder_configs must be {rule}, got {path}")
    _check_model_type(path)
    model = MervForConditionalGeneration.from_pretrained(path, dtype=dtype or "auto", **sources.hub)
    return MervModel(model, MervProcessor.from_pretrained(path, **sources.hub))


def _check_model_type(path: str | Path) -> None:
    config = Path(path) / "config.json"
    if Path(path).is_dir() and not config.is_file():
        raise CheckpointError(f"{path}: no config.json: neither a run directory of the reference nor a model of ours")
    if config.is_file() and (kind := read_json(config).get("model_type")) != "merv":
        raise CheckpointError(f"{config}: model_type must be 'merv', got {kind!r}")


def _load_run(config_json: Path, checkpoint: Path, sources: Sources, dtype: torch.dtype | None) -> MervModel:
    run = read_run_config(config_json)
    tensors = read_checkpoint(checkpoint)
    ids = run["video_backbone_ids"]
    if unknown := (sources.encoder_paths.keys() | sources.encoder_configs.keys()) - set(ids):
        raise ValueError(f"load_vid: encoders must be among {', '.join(ids)}, got {', '.join(sorted(unknown))}")
    encoders = [_encoder(*pair, run, sources) for pair in zip(ids, run["num_frames"], strict=True)]
    names = encoder_names(encoders)
    for name, encoder_id, encoder in zip(names, ids, encoders, strict=True):
        weights = sources.encoder_weights(encoder_id, encoder)
        tensors |= {f"video_model.encoders.{name}.{key}": value for key, value in weights.items()}

    row = language_model(run["llm_backbone_id"])
    text_config = AutoConfig.from_pretrained(sources.llm_path or row.hub_id, **sources.hub)
    tokenizer = _tokenizer(row, sources)
    text_config.pad_token_id = tokenizer.pad_token_id
    video_token_id = tokenizer.convert_tokens_to_ids(row.video_token)
    config = merv_config(run, dict(zip(names, encoders, strict=True)), text_config, video_token_id, tensors)
    if dtype is None:
        dtype = next((t.dtype for key, t in tensors.items() if key.startswith("language_model.")), torch.float32)
    model = MervForConditionalGeneration.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    model.generation_config = GenerationConfig.from_model_config(text_config)
    processor = MervProcessor(
        MervVideoProcessor(num_frames=max(config.num_frames)),
        tokenizer,
        chat_template=chat_template(config.prompt_format, row.video_token),
        num_video_tokens=model.video_model.num_video_tokens,
        video_token=row.video_token,
    )
    return MervModel(model, processor)


def _encoder(encoder_id: str, num_frames: int, run: Mapping[str, Any], sources: Sources) -> AnyEncoderConfig:
    if (given := sources.encoder_configs.get(encoder_id)) is not None:
        return dataclasses.replace(given, num_frames=num_frames)
    return encoder_config(encoder_id, num_frames, run["image_resize_strategy"])


def _tokenizer(row: LanguageModel, sources: Sources) -> Any:
    """The language model's tokenizer with MERV's padding token and a marker for the video.

    A ``tokenizer.json`` is taken as it stands, as by the reference: transformers 5 would rebuild LLaMA-2's so that the
    second turn of a prompt is cut into other tokens.
    """
    source = sources.llm_path or row.tokenizer_id or row.hub_id
    kind = PreTrainedTokenizerFast if sources.has_file(source, "tokenizer.json") else AutoTokenizer
    tokenizer = kind.from_pretrained(source, padding_side="right", **sources.hub)
    if row.pad_token is not None:
        tokenizer.add_special_tokens({"pad_token": row.pad_token})
    # Known to the tokenizer or new: either way it must come out as one token.
    tokenizer.add_tokens([row.video_token], special_tokens=True)
    return tokenizer
