"""A run directory of the reference, written from the golden files: what load_vid finds on a user's disk."""

import dataclasses
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from merv_fast.encoders import EncoderConfig, encoder_config
from tests.golden_files import load, weights

MODELS = [
    "model_cross_attention_avg_lq_linear",
    "model_cross_attention_avg_lq_mlp",
    "model_concat_linear",
    "model_concat_channel_linear",
]
ENCODERS = {
    "languagebind-video-noclass": "encoder_languagebind",
    "dinov2-video-all-tokens": "encoder_dinov2",
    "vivit-google-b-all-no-cls-16frames": "encoder_vivit",
    "siglip-vit-b16-224px-all-no-cls": "encoder_siglip",
}


def encoder_configs(num_frames: list[int]) -> dict[str, EncoderConfig]:
    """The published configurations at the golden files' size."""
    configs = {}
    for (encoder_id, name), frames in zip(ENCODERS.items(), num_frames, strict=True):
        shape = load(name)[1]["config"]
        full = encoder_config(encoder_id, 32)
        depth = shape.get("depth") or shape["num_hidden_layers"]
        size = shape.get("img_size") or shape["image_size"]
        changes = {
            "num_frames": frames,
            "width": shape.get("embed_dim") or shape["hidden_size"],
            "heads": shape.get("num_heads") or shape["num_attention_heads"],
            "mlp_width": shape.get("intermediate_size") or 4 * shape["embed_dim"],
            "depth": depth,
            "blocks": depth - (full.depth - full.blocks),
            "image_size": size,
            "recipe": dataclasses.replace(full.recipe, size=size, short_side=size),
        }
        if full.temporal_window:
            changes["temporal_window"] = shape["num_frames"]
        configs[encoder_id] = dataclasses.replace(full, **changes)
    return configs


def byte_tokenizer(vocab_size: int, video_token: str = "<|video_pad|>") -> PreTrainedTokenizerFast:
    """Bytes as tokens behind <PAD>, <s>, </s> and the video token, with BOS in front as LLaMA's has."""
    special = ["<PAD>", "<s>", "</s>", video_token]
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols += [f"<unused{index}>" for index in range(vocab_size - len(symbols))]
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<PAD>",
        extra_special_tokens=[video_token],
    )


def checkpoint(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The groups of a checkpoint's ``model`` entry."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in weights(tensors, "checkpoint.").items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = value.clone()
    return groups


def write_run(folder: Path, name: str = MODELS[0], **changes: object) -> dict[str, object]:
    """Write run, language model and encoders under ``folder``; return what ``load_vid`` takes to load them."""
    tensors, metadata = load(name)
    run = {
        "model_id": "golden",
        "vidlm_id": "dropped",
        "type": "dropped",
        "arch_specifier": metadata["arch_specifier"],
        "feature_fusion": metadata["feature_fusion"],
        "video_backbone_ids": list(ENCODERS),
        "llm_backbone_id": "llama2-7b-pure",
        "image_resize_strategy": "resize-naive",
        "llm_max_length": 2048,
        "num_frames": metadata["num_frames"],
        "projector_token_length": metadata["projector_token_length"],
        "visual_feature_length": metadata["visual_feature_length"],
        "finetune_epochs": 1,
    } | changes
    (folder / "run/checkpoints").mkdir(parents=True)
    (folder / "run/config.json").write_text(json.dumps({"model": run, "seed": 7}))
    torch.save({"model": checkpoint(tensors), "optimizer": {}}, folder / "run/checkpoints/latest-checkpoint.pt")
    LlamaConfig(**metadata["llama"]).save_pretrained(folder / "llm")
    byte_tokenizer(metadata["llama"]["vocab_size"]).save_pretrained(folder / "llm")
    paths = {}
    for encoder_id, file in ENCODERS.items():
        paths[encoder_id] = folder / encoder_id
        paths[encoder_id].mkdir()
        torch.save(weights(load(file)[0]), paths[encoder_id] / "pytorch_model.bin")
    configs = encoder_configs(metadata["num_frames"])
    used = set(run["video_backbone_ids"])
    return {
        "model_id_or_path": folder / "run",
        "llm_path": folder / "llm",
        "encoder_paths": {encoder_id: path for encoder_id, path in paths.items() if encoder_id in used},
        "encoder_configs": {encoder_id: config for encoder_id, config in configs.items() if encoder_id in used},
    }
