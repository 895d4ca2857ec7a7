"""train: load, train, say what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from transformers.utils import is_accelerate_available

from merv_fast.models import load_vid

__all__ = ["parse_settings", "show_report", "train_model"]


def train_model(
    stage: str,
    data: Path,
    out: Path,
    model: str,
    media: Path | None,
    settings: dict[str, Any],
    llm_path: Path | None,
    encoder_paths: dict[str, str],
    **options: Any,
) -> Any:
    """Train ``model`` and return the report; see `merv_fast.training.train`."""
    if not is_accelerate_available():
        raise RuntimeError("train needs accelerate: pip install 'merv-fast[train]'")
    import torch

    from merv_fast.training import read_entries, train

    # What is wrong with the data is worth knowing before a model of 30 GB is loaded.
    read_entries(data, media, check_files=options["on_error"] == "raise")
    # Weights that small updates are added to; the arithmetic is bfloat16 where the GPU has it.
    vidlm = load_vid(model, llm_path=llm_path, encoder_paths=encoder_paths, dtype=torch.float32)
    return train(vidlm, stage, data, out, media=media, arguments=settings, **options)


def parse_settings(given: Sequence[str] | None) -> dict[str, Any]:
    """``KEY=VALUE`` strings as a dict; a value that is JSON is what it says, any other is text."""
    settings = {}
    for item in given or []:
        key, found, value = item.partition("=")
        if not (key and found):
            raise typer.BadParameter(f"--set must be KEY=VALUE, got {item!r}")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings


def show_report(report: Any, out: Path) -> None:
    """Steps, losses, and what was skipped; only the first process speaks."""
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    if losses := report.losses:
        typer.echo(f"{report.steps} steps; loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    for reason, times in report.skipped.items():
        typer.echo(f"skipped {times} time(s): {reason}", err=True)
    typer.echo(f"written to {out}: the model, its checkpoints, history.json")
