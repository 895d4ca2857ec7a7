"""profile: where the time of an answer goes, as a trace, a picture and a table."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.profiler import ProfilerActivity, _ExperimentalConfig, profile

from merv_fast.cli.ask import Loader, waiting
from merv_fast.models.spans import model_spans
from merv_fast.runtime.timeline import Total, draw_timeline, read_lanes, totals
from merv_fast.runtime.trace import span
from merv_fast.video import open_video
from merv_fast.video.drawing import png

__all__ = ["Profile", "profile_answer", "show_profile"]


@dataclass(frozen=True)
class Profile:
    """What ``profile`` prints; with ``--json`` as it stands.

    Attributes:
        answer: The text of the profiled answer.
        trace: Where the trace was written.
        png: Where the picture was written.
        ranges: A `Total` for each name.
    """

    model: str
    device: str
    answer: str
    trace: str
    png: str | None
    ranges: list[Total]


def profile_answer(
    video: Path,
    question: str,
    loader: Loader,
    max_new_tokens: int,
    clip: dict[str, Any],
    out: Path,
    picture: Path | None,
) -> Profile:
    """Answer twice, the second time under ``torch.profiler``, and write what it saw."""
    check_files(out, picture)
    open_video(video, fps=clip["fps"])  # a bad file is worth knowing of before a model of 30 GB is loaded
    with waiting(f"loading {loader.model}"):
        vidlm = loader.load()
    builder = vidlm.get_prompt_builder()
    builder.add_turn(role="human", message=question)
    arguments = {"max_new_tokens": max_new_tokens, "do_sample": False, **clip}
    with waiting(f"warming up on {vidlm.device}"):
        vidlm.answer(video, builder.get_prompt(), **arguments)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (vidlm.device.type == "cuda")
    every_thread = _ExperimentalConfig(profile_all_threads=True)
    with (
        waiting(f"answering on {vidlm.device}"),
        quiet_profiler(),
        model_spans(vidlm),
        profile(activities=activities, experimental_config=every_thread) as recorded,
        span("answer"),
    ):
        (answer,) = vidlm.answer(video, builder.get_prompt(), **arguments)
    recorded.export_chrome_trace(str(out))
    lanes = read_lanes(json.loads(out.read_text()))
    if picture is not None:
        title = f"{video.name}, {vidlm.model_id} on {vidlm.device}, torch {torch.__version__}"
        picture.write_bytes(png(draw_timeline(title, lanes)))
    return Profile(
        model=vidlm.model_id,
        device=str(vidlm.device),
        answer=answer.answer,
        trace=str(out),
        png=None if picture is None else str(picture),
        ranges=totals(lanes),
    )


def check_files(out: Path, picture: Path | None) -> None:
    """Raise ValueError unless both can be written, before anything takes time."""
    for option, path, suffix in (("--out", out, ".json"), ("--png", picture, ".png")):
        if path is None:
            continue
        if path.suffix.lower() != suffix:
            raise ValueError(f"{option} must be a {suffix} file, got {path}")
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"{option} must be a file that can be written, got {path}")


@contextmanager
def quiet_profiler() -> Iterator[None]:
    """Keep the profiler's log of its own steps off stderr, unless the user asked for a level."""
    name = "KINETO_LOG_LEVEL"
    asked = name in os.environ
    os.environ.setdefault(name, "6")
    try:
        yield
    finally:
        if not asked:
            del os.environ[name]


def show_profile(result: Profile) -> None:
    """The table for a person."""
    console = Console()
    table = Table(title=f"{escape(result.model)} on {result.device}, under the profiler", title_justify="left")
    table.add_column("range", overflow="fold")
    on_gpu = any(line.gpu_ms is not None for line in result.ranges)
    for column in ("count", "ms", "share", *["GPU ms"] * on_gpu):
        table.add_column(column, justify="right", no_wrap=True)
    for line in result.ranges:
        gpu = [f"{line.gpu_ms or 0:.2f}"] * on_gpu
        table.add_row(line.name, str(line.count), f"{line.ms:.2f}", f"{line.share:.1%}", *gpu)
    console.print(table)
    console.print(f"trace: {escape(result.trace)} (opens in ui.perfetto.dev)", highlight=False, soft_wrap=True)
    if result.png:
        console.print(f"timeline: {escape(result.png)}", highlight=False, soft_wrap=True)
