"""The stages of training: which parts learn, and with which hyperparameters."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from merv_fast.models.modeling import MervForConditionalGeneration

__all__ = ["STAGES", "Stage", "training_arguments"]


@dataclass(frozen=True)
class Stage:
    """What one stage trains.

    Args:
        name: of the stage.
        trains_encoders: whether the encoders learn; else they are in evaluation mode.
        trains_llm: whether the language model learns. If not it is still in training mode, as in the reference, for
            gradients pass through it and only there are its activations recomputed instead of kept.
        global_batch_size: entries of a step, of all processes together.
        batch_size: entries that one device takes at a time; gradients of several are added up to a step.
        learning_rate: at the peak.
        weight_decay: of tensors of two dimensions or more.
    """

    name: str
    trains_encoders: bool
    trains_llm: bool
    global_batch_size: int
    batch_size: int
    learning_rate: float
    weight_decay: float

    def frozen(self, model: MervForConditionalGeneration) -> list[nn.Module]:
        """The parts that do not learn."""
        parts = {model.video_model.encoders: self.trains_encoders, model.language_model: self.trains_llm}
        return [part for part, learns in parts.items() if not learns]

    def apply(self, model: MervForConditionalGeneration) -> None:
        """Set which parameters take gradients; projectors and fusion always do."""
        model.requires_grad_(True)
        for part in self.frozen(model):
            part.requires_grad_(False)

    def train(self, model: MervForConditionalGeneration) -> None:
        """Training mode, but evaluation mode for encoders that do not learn."""
        model.train()
        if not self.trains_encoders:
            model.video_model.encoders.eval()


STAGES = {
    "align": Stage("align", False, False, 256, 16, 1e-3, 0.0),
    "finetune": Stage("finetune", False, True, 128, 8, 2e-5, 0.1),
    # The reference has a name for this stage and no code; the numbers are those of finetune.
    "full": Stage("full", True, True, 128, 8, 2e-5, 0.1),
}
"""By name. Source: ``merv/conf/models.py`` of the reference, merv-base; merv-full aligns at a learning rate of 1e-4."""


RECOMPUTED = ("activation_checkpointing", "gradient_checkpointing")
"""New and old name of the argument that has activations of the language model recomputed instead of kept."""

RECOMPUTE = next(name for name in RECOMPUTED if hasattr(TrainingArguments, name))
"""The one that this transformers has."""


def sharded_units(model: MervForConditionalGeneration, fsdp_config: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """``fsdp_config``, also of a JSON file, with the classes that are sharded each by itself unless it names some.

    transformers takes all that a model could have, and gives up at the first that this one does not have.
    """
    given = json.loads(Path(fsdp_config).read_text()) if isinstance(fsdp_config, str) else dict(fsdp_config or {})
    there = {type(module).__name__ for module in model.modules()}
    units = sorted(there.intersection(model._no_split_modules or ()))
    key = "transformer_layer_cls_to_wrap"
    return given if given.keys() & {key, f"fsdp_{key}"} else given | {key: units}


def training_arguments(stage: Stage, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of transformers' ``TrainingArguments``: the reference's, unless ``given`` has others.

    Among them bfloat16 autocast on a GPU that has it, and activations of the language model that are recomputed.

    ``global_batch_size``, which is ours, becomes ``gradient_accumulation_steps`` unless that is given; with the number
    of processes of the launcher it must come out whole.

    Raises:
        ValueError: it does not.

    >>> training_arguments(STAGES["align"], {"num_train_epochs": 2})["gradient_accumulation_steps"]
    16
    """
    arguments: dict[str, Any] = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": stage.batch_size,
        "learning_rate": stage.learning_rate,
        "weight_decay": stage.weight_decay,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # a share of all steps, as every number below 1
        "seed": 7,
        "dataloader_num_workers": 2,
        "save_steps": 512,
        "logging_steps": 1,
        "report_to": "none",
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Processes on a CPU find each other only if they are told that it is one.
        "use_cpu": not torch.accelerator.is_available(),
    }
    if not given.keys() & {"bf16", "fp16", "use_cpu"}:
        arguments["bf16"] = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    if not given.keys() & set(RECOMPUTED):
        arguments |= {RECOMPUTE: True, f"{RECOMPUTE}_kwargs": {"use_reentrant": False}}
    arguments |= given
    total = arguments.pop("global_batch_size", stage.global_batch_size)
    if "gradient_accumulation_steps" not in given:
        processes = int(os.environ.get("WORLD_SIZE", 1))
        together = arguments["per_device_train_batch_size"] * processes
        if total < 1 or total % together:
            rule = f"a multiple of per_device_train_batch_size times processes ({together})"
            raise ValueError(f"train: global_batch_size must be {rule}, got {total}")
        arguments["gradient_accumulation_steps"] = total // together
    return arguments
