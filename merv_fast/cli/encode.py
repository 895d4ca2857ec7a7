"""encode: a corpus of videos to visual tokens, with a bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from merv_fast.cli.ask import Loader, parse_device, parse_dtype
from merv_fast.integrations.corpus.encode import Outcome, encode_corpus

__all__ = ["encode_videos", "given_paths", "show_outcome"]


def given_paths(videos: Sequence[str], listed: Path | None) -> list[str]:
    """Paths from the command line, ``-`` standing for lines of stdin, and from a file of one path a line."""
    paths: list[str] = []
    for video in videos:
        paths += lines_of(sys.stdin.read()) if video == "-" else [video]
    if listed is not None:
        paths += lines_of(listed.read_text(errors="surrogateescape"))
    if not paths:
        raise ValueError("encode: videos must be given as arguments, with --list, or as lines of stdin (-), got none")
    return paths


def lines_of(text: str) -> list[str]:
    """Paths of a text, one a line."""
    return [line for line in text.split("\n") if line.strip()]


def encode_videos(paths: Sequence[str], out: Path, loader: Loader, engine: str, **options: Any) -> Outcome:
    """Encode what is not there yet, under a bar."""
    disable_progress_bar()  # transformers' own
    device = None if loader.device == "auto" else loader.device
    if engine == "local":
        device = str(parse_device(loader.device))
    dtype = None if loader.dtype == "auto" else parse_dtype(loader.dtype)
    model: dict[str, Any] = {"model": loader.model, "llm_path": loader.llm_path, "encoder_paths": loader.encoder_paths}
    # Ray tells what happens to workers on stdout, where only the outcome belongs.
    with redirect_stdout(sys.stderr), bar() as progress:
        try:
            return encode_corpus(
                paths, out, **model, device=device, dtype=dtype, engine=engine, progress=progress, **options
            )
        except ImportError as error:
            raise RuntimeError(error) from error


def show_outcome(outcome: Outcome, as_json: bool) -> None:
    """One line; or all numbers as a JSON object."""
    if as_json:
        typer.echo(json.dumps(asdict(outcome), ensure_ascii=False))
        return
    line = f"{outcome.encoded} encoded, {outcome.failed} failed, {outcome.already} already there: {outcome.folder}"
    if outcome.failed_before:
        line += f" ({outcome.failed_before} failed before; --retry-failed tries them again)"
    typer.echo(line)


class Rate(ProgressColumn):
    """Videos a second, since the first of them were done."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f}/s")


@contextmanager
def bar() -> Iterator[Any]:
    """A function that draws the state of a run on stderr."""
    columns = (
        TextColumn("encoding"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, failed="")

        def show(total: int, encoded: int, failed: int) -> None:
            count = f"{failed} failed" if failed else ""
            progress.update(task, total=total, completed=encoded + failed, failed=count)

        yield show
