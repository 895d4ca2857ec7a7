"""ask and explain: load, answer, show."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import TextStreamer
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from merv_fast.models import Answer, MervModel, explain, load_vid
from merv_fast.models.requests import Window
from merv_fast.runtime.cache import VideoCache
from merv_fast.runtime.environment import default_device, default_dtype
from merv_fast.video import open_video
from merv_fast.video.dali import DaliVideo

__all__ = ["Loader", "answer_json", "answer_question", "show_answer", "show_explanation"]

BAR = 24


@dataclass(frozen=True)
class Loader:
    """The options that say which model, where it runs, and where it keeps encoded videos."""

    model: str
    device: str
    dtype: str
    llm_path: Path | None
    encoder_paths: dict[str, str]
    cache: Path | None = None

    def load(self) -> MervModel:
        """The model, on its device."""
        device = parse_device(self.device)
        dtype = default_dtype(device) if self.dtype == "auto" else parse_dtype(self.dtype)
        cache = None if self.cache is None else VideoCache(folder=self.cache)
        vidlm = load_vid(self.model, llm_path=self.llm_path, encoder_paths=self.encoder_paths)
        vidlm.cache = cache
        return vidlm.to(device, dtype=dtype)


def parse_device(name: str) -> torch.device:
    """The device of that name, if this machine has it."""
    if name == "auto":
        return default_device()
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here; see merv-fast doctor")
    return device


def parse_dtype(name: str) -> torch.dtype:
    """The floating-point type of that name."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in names:
        raise ValueError(f"--dtype must be auto or one of {', '.join(names)}, got {name!r}")
    return names[name]


def answer_question(
    video: Path,
    question: str,
    loader: Loader,
    max_new_tokens: int,
    clip: dict[str, Any],
    windows: int = 1,
    stream: bool = False,
) -> tuple[Answer, str | None]:
    """The answer, and what is to be said of its model; with ``stream`` its text is printed while it is made."""
    open_video(video, fps=clip["fps"])  # a bad file is worth knowing of before a model of 30 GB is loaded
    with waiting(f"loading {loader.model}"):
        vidlm = loader.load()
    builder = vidlm.get_prompt_builder()
    builder.add_turn(role="human", message=question)
    arguments = {"max_new_tokens": max_new_tokens, "do_sample": False, "windows": windows, **clip}
    if stream:
        # A spinner and the text would write over each other.
        streamer = TextStreamer(vidlm.tokenizer, skip_prompt=True, skip_special_tokens=True)
        (answer,) = vidlm.answer(video, builder.get_prompt(), streamer=streamer, **arguments)
    else:
        with waiting(f"answering on {vidlm.device}"):
            (answer,) = vidlm.answer(video, builder.get_prompt(), **arguments)
    return answer, note_on(vidlm)


def note_on(vidlm: MervModel) -> str | None:
    """What whoever reads a model's answers should know, if anything."""
    if not vidlm.config.trained:
        return f"note: {vidlm.model_id} has random weights; its answers are noise."
    if vidlm.config.domain:
        return f"note: {vidlm.model_id} knows {vidlm.config.domain} and nothing else; elsewhere its answers are noise."
    return None


def answer_json(answer: Answer) -> str:
    """One JSON object; ``windows`` is in it where there are some."""
    fields = asdict(answer)
    if not answer.windows:
        del fields["windows"]
    return json.dumps(fields, ensure_ascii=False)


def show_answer(answer: Answer, streamed: bool = False) -> None:
    """Answer, unless it was ``streamed``, weights and times for a person."""
    console = Console()
    if not streamed or not answer.answer:
        console.print(answer.answer or "(an empty answer)", markup=False, highlight=False)
    console.print()
    if answer.encoder_weights:
        console.print(weights_table(answer.encoder_weights))
    if answer.windows and answer.encoder_weights:
        console.print(windows_table(answer.windows))
    times = Table(title=f"{answer.model} on {answer.device}", title_justify="left")
    times.add_column("stage")
    times.add_column("ms", justify="right")
    for stage, milliseconds in answer.timings_ms.items():
        times.add_row(stage, f"{milliseconds:.1f}")
    times.add_section()
    times.add_row("total", f"{math.fsum(answer.timings_ms.values()):.1f}")
    console.print(times)


def show_explanation(path: Path, loader: Loader, clip: dict[str, Any]) -> None:
    """Decoder, encoder weights, and every choice."""
    console = Console()
    device = parse_device(loader.device)
    video = open_video(path, fps=clip["fps"], device=device)
    where = video.device if isinstance(video, DaliVideo) else "cpu"
    with waiting(f"loading {loader.model}"):
        vidlm = loader.load()
    vidlm.host_memory = vidlm.device.type != "cuda"
    with waiting(f"encoding on {vidlm.device}"):
        tokens = vidlm.encode(path, **clip)
    height, width = video.size
    if tokens.encoder_weights:
        console.print(weights_table(tokens.encoder_weights))
    table = Table(title=f"{vidlm.model_id}: what runs where and why", title_justify="left")
    for column in ("part", "runs", "where", "why"):
        table.add_column(column, overflow="fold")
    table.add_row("decode", video.decoder, str(where), f"{len(video)} frames of {width}x{height} at {video.fps:g}/s")
    for choice in explain(vidlm):
        table.add_row(choice.part, choice.runs, choice.where, choice.why)
    console.print(table)


def weights_table(weights: dict[str, float]) -> Table:
    """A bar for each encoder's share."""
    table = Table(title="weight of each encoder", title_justify="left")
    table.add_column("encoder", no_wrap=True)
    table.add_column("weight", justify="right", no_wrap=True)
    table.add_column("", max_width=BAR, overflow="crop")
    for name, weight in weights.items():
        table.add_row(name, f"{weight:.3f}", ("█" * round(weight * BAR)).ljust(BAR, "░"))
    return table


def windows_table(windows: Sequence[Window]) -> Table:
    """A line for each window: its bounds, and each encoder's share in percent."""
    table = Table(title="weight of each encoder in each window, in percent", title_justify="left")
    table.add_column("seconds", justify="right", no_wrap=True)
    for name in windows[0].encoder_weights or {}:
        table.add_column(name, justify="right")
    for window in windows:
        shares = (window.encoder_weights or {}).values()
        table.add_row(f"{window.start:.1f}-{window.end:.1f}", *(f"{100 * share:.1f}" for share in shares))
    return table


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner with the time gone by, on stderr, while the block runs."""
    disable_progress_bar()  # transformers' own, of which this one takes the place
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(what, total=None)
        yield
    if console.is_terminal:
        enable_progress_bar()
