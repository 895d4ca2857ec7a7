"""train: from a model and a data file to a directory that ``load_vid`` loads."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from merv_fast.models.merv_model import MervModel
from merv_fast.training.collator import Collator
from merv_fast.training.data import Entry, read_entries
from merv_fast.training.dataset import OnError, TrainingDataset
from merv_fast.training.features import StoredFeatures, encode_videos
from merv_fast.training.stages import STAGES, Stage, sharded_units, training_arguments
from merv_fast.training.tokens import Tokens, caption_tokens, conversation_tokens
from merv_fast.training.trainer import MervTrainer

__all__ = ["TrainingReport", "train"]

logger = logging.getLogger("merv_fast")

STATE = "trainer_state.json"
"""The file of a checkpoint that Trainer writes last."""


@dataclass(frozen=True)
class TrainingReport:
    """What happened: ``log`` is Trainer's, ``skipped`` says why entries were left out and how often."""

    steps: int
    log: list[dict[str, Any]]
    skipped: dict[str, int]

    @property
    def losses(self) -> list[float]:
        """The loss of each step that was logged."""
        return [row["loss"] for row in self.log if "loss" in row]


def train(
    vidlm: MervModel,
    stage: str,
    data: str | Path,
    out: str | Path,
    *,
    media: str | Path | None = None,
    cache: str | Path | None = None,
    cache_gib: float = 64.0,
    on_error: OnError = "raise",
    resume: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> TrainingReport:
    """Train a model and write it to a directory, with checkpoints to resume from and ``history.json``.

    Every process of a launcher (``torchrun``, ``accelerate launch``) calls it; processes share the work by what
    ``arguments`` say: data parallel if nothing else, FSDP2 by ``fsdp`` and ``fsdp_config``, DeepSpeed by ``deepspeed``.

    Args:
        vidlm: the model, changed in place, and in shards if they were asked for; its weights are the master copy, so
            load it in float32.
        stage: "align" trains projectors and fusion, "finetune" the language model too, "full" also the encoders.
        data: as `read_entries` takes it.
        out: the directory.
        media: folder of the videos; default the folder of ``data``.
        cache: folder for what frozen encoders return of each video, so that they run once and not in every epoch; seen
            by all processes.
        cache_gib: what it may take.
        on_error: "raise" what is wrong with an entry or its video, or "skip" it; the report counts them.
        resume: go on from the last whole checkpoint in ``out``; from the beginning if there is none.
        arguments: of transformers' ``TrainingArguments``, and ``global_batch_size``; see `training_arguments`.

    Raises:
        ValueError: what cannot be asked for, or is wrong in the data.
        VideoError: a video cannot be read.

    Example:
        >>> import json, tempfile, merv_fast
        >>> from merv_fast.training import train
        >>> folder = Path(tempfile.mkdtemp())
        >>> turns = [{"from": "human", "value": "What happens?"}, {"from": "gpt", "value": "It falls."}]
        >>> entry = {"video": str(merv_fast.sample_clip()), "conversations": turns}
        >>> _ = (folder / "data.json").write_text(json.dumps([entry]))
        >>> arguments = {"max_steps": 1, "global_batch_size": 1, "per_device_train_batch_size": 1}
        >>> arguments |= {"dataloader_num_workers": 0, "disable_tqdm": True}
        >>> vidlm = merv_fast.load_vid("merv-tiny")
        >>> train(vidlm, "align", folder / "data.json", folder / "out", arguments=arguments).steps
        1
        >>> text = merv_fast.load_vid(folder / "out").generate(merv_fast.sample_clip(), "What?", max_new_tokens=2)
    """
    if stage not in STAGES:
        raise ValueError(f"train: stage must be one of {', '.join(STAGES)}, got {stage!r}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"train: on_error must be 'raise' or 'skip', got {on_error!r}")
    chosen, out = STAGES[stage], Path(out)
    if cache is not None and chosen.trains_encoders:
        raise ValueError(f"train: cache must be left out of the stage {stage}, which changes what would be kept")
    start = last_checkpoint(out) if resume else None
    if not resume and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"train: out must be an empty directory, or resume True, got {out}")
    entries = read_entries(data, media, check_files=on_error == "raise")
    settings = _settings(vidlm, chosen, out, arguments or {})
    vidlm.model.eval()
    features = None
    if cache is not None:
        features = stored_features(vidlm, entries, Path(cache), cache_gib, on_error, settings)
    video_model = vidlm.model.video_model
    count, tokens = max(vidlm.config.num_frames), video_model.num_video_tokens
    chosen.apply(vidlm.model)
    vidlm.config.trained, vidlm.config.domain = True, ""
    trainer = MervTrainer(
        stage=chosen,
        model=vidlm.model,
        args=settings,
        train_dataset=TrainingDataset(entries, tokeniser(vidlm, chosen), count, tokens, on_error, features),
        data_collator=Collator.of(video_model, vidlm.tokenizer, with_features=features is not None),
        processing_class=vidlm.processor,
    )
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    vidlm.eval()
    report = TrainingReport(trainer.state.global_step, trainer.state.log_history, trainer.all_skipped())
    save(vidlm, trainer, report, out)
    return report


def _settings(vidlm: MervModel, stage: Stage, out: Path, arguments: Mapping[str, Any]) -> TrainingArguments:
    """The arguments of Trainer, once the processes have found each other."""
    given = training_arguments(stage, arguments)
    if given.get("fsdp"):
        given["fsdp_config"] = sharded_units(vidlm.model, given.get("fsdp_config"))
    settings = TrainingArguments(str(out), **given)
    if settings.world_size != (launched := int(os.environ.get("WORLD_SIZE", 1))):
        group = settings.world_size
        raise RuntimeError(f"train: {launched} processes were launched, but this one is in a group of {group}")
    if settings.n_gpu > 1:
        raise ValueError(f"train: processes must be one per GPU, got one for {settings.n_gpu}; start it with torchrun")
    return settings


def tokeniser(vidlm: MervModel, stage: Stage) -> Callable[[Entry], Tokens]:
    """What makes ids and labels of an entry in that stage."""
    length = vidlm.config.max_text_length
    if not stage.trains_llm:
        return partial(caption_tokens, tokenizer=vidlm.tokenizer, max_length=length)
    prompt_format = vidlm.config.prompt_format
    return partial(conversation_tokens, tokenizer=vidlm.tokenizer, prompt_format=prompt_format, max_length=length)


def stored_features(
    vidlm: MervModel, entries: list[Entry], folder: Path, gib: float, on_error: OnError, settings: TrainingArguments
) -> StoredFeatures:
    """Every video encoded, with the arithmetic that training would have."""
    video_model, device = vidlm.model.video_model, settings.device
    videos = [entry.video for entry in entries if entry.video is not None]
    half = torch.bfloat16 if settings.bf16 else torch.float16
    with torch.autocast(device.type, half, enabled=settings.bf16 or settings.fp16):
        return encode_videos(
            video_model.to(device),
            videos,
            folder,
            int(gib * 2**30),
            on_error=on_error,
            workers=settings.dataloader_num_workers,
        )


def save(vidlm: MervModel, trainer: MervTrainer, report: TrainingReport, out: Path) -> None:
    """The whole model, wherever its shards are, and what happened; written by the first process."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        vidlm.save_pretrained(out, state_dict=weights)
        history = {"stage": trainer.stage.name, "steps": report.steps, "skipped": report.skipped, "log": report.log}
        (out / "history.json").write_text(json.dumps(history, indent=1))
    PartialState().wait_for_everyone()


def last_checkpoint(out: Path) -> Path | None:
    """The checkpoint of most steps that was written to its end, if there is one."""
    found = [path for path in out.glob("checkpoint-*") if path.name[11:].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name[11:]), reverse=True):
        try:
            json.loads((path / STATE).read_text())
        except (OSError, ValueError):
            logger.warning("%s: not used: it was not written to its end", path)
        else:
            return path
    return None
