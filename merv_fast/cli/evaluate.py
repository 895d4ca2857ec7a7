"""eval: answer the questions of a data set, print the accuracy."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from merv_fast.cli.ask import Loader, note_on, waiting
from merv_fast.integrations.evaluation.predictions import Predictions
from merv_fast.integrations.evaluation.questions import read_questions
from merv_fast.integrations.evaluation.run import Score, evaluate, part_of, score

__all__ = ["evaluate_folder"]


def evaluate_folder(
    folder: Path,
    loader: Loader,
    out: Path,
    part: tuple[int, int],
    batch_size: int,
    max_new_tokens: int,
    names: tuple[str, str],
    as_json: bool,
) -> None:
    """Answer this process's share, then say how it stands with all."""
    questions = read_questions(folder, *names)
    own = part_of(questions, *part)
    settings = {
        "model": loader.model,
        "data": str(folder.resolve()),
        "questions": names[0],
        "max_new_tokens": max_new_tokens,
        "dtype": loader.dtype,
    }
    predictions = Predictions(out, part, settings)
    try:
        with waiting(f"loading {loader.model}"):
            vidlm = loader.load()
        columns = [TextColumn("asking"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
        with Progress(*columns, console=Console(stderr=True), disable=not Console(stderr=True).is_terminal) as bar:
            task = bar.add_task("asking", total=len(own))
            evaluate(
                vidlm,
                own,
                predictions,
                batch_size=batch_size,
                each=lambda count: bar.advance(task, count),
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        result = score(questions, predictions)
    finally:
        predictions.close()
    show(result, len(questions), out, as_json, all(question.is_choice for question in questions))
    if note := note_on(vidlm):
        typer.echo(note, err=True)


def show(result: Score, count: int, out: Path, as_json: bool, choice: bool) -> None:
    """Print it, and keep it once all questions have been asked."""
    values = {
        "accuracy": result.accuracy,
        "right": result.right,
        "questions": count,
        "failed": result.failed,
        "missing": result.missing,
        "rule": "first letter" if choice else "same words, without case, punctuation and articles",
    }
    if not result.missing:
        (out / "accuracy.json").write_text(json.dumps(values, indent=2) + "\n")
    if as_json:
        typer.echo(json.dumps(values))
        return
    for key, reason in result.failed.items():
        typer.echo(f"question {key}: {reason}", err=True)
    if result.missing:
        typer.echo(f"{result.missing} of {count} questions are left to other processes", err=True)
    typer.echo(f"accuracy {result.accuracy:.3f} ({result.right} of {count - result.missing}, {values['rule']})")
