"""``python -m merv_fast.training.tiny train FOLDER``, ``eval``, ``examples FOLDER``: make merv-tiny, and measure it."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console
from rich.table import Table

from merv_fast.models import load_vid
from merv_fast.training.tiny.answering import Score
from merv_fast.training.tiny.evaluation import Asked, Blind, ask_all, held_out_questions, scores
from merv_fast.training.tiny.questions import KINDS, questions_about
from merv_fast.training.tiny.recipe import Run
from merv_fast.training.tiny.scenes import draw_scene

TRAINING_SEED, EVALUATION_SEED, EXAMPLES_SEED = 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(prog="python -m merv_fast.training.tiny", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="from nothing; a run goes on where it was stopped")
    train.add_argument("folder", type=Path, help="for clips, features, checkpoints, the log, and the model")
    train.add_argument("--seed", type=int, default=TRAINING_SEED, help="all else follows from it (default %(default)s)")
    train.add_argument("--clips", type=int, default=Run.count, help="default %(default)s")
    evaluate = commands.add_parser("eval", help="accuracy on new clips, by kind of question")
    evaluate.add_argument("--model", default="merv-tiny", help="a directory, or %(default)s")
    evaluate.add_argument("--questions", type=int, default=2200, help="at least so many (default %(default)s)")
    evaluate.add_argument("--json", type=Path, help="write every question and answer there")
    chosen = commands.add_parser("examples", help="a new clip for each kind of question")
    chosen.add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if given.command == "train":
        model = Run(given.folder, given.seed, given.clips)()
        model.save_pretrained(given.folder / "model")
    elif given.command == "eval":
        report(given.model, given.questions, given.json)
    else:
        write_examples(given.folder)


def report(model: str, count: int, file: Path | None) -> None:
    """Ask, and print how many answers are right."""
    vidlm = load_vid(model)
    with TemporaryDirectory() as folder:
        asked = held_out_questions(Path(folder), count, EVALUATION_SEED)
        answers = ask_all(vidlm, asked)
    rngs = (np.random.default_rng([TRAINING_SEED, index, 2]) for index in range(10_000))
    seen = [question for rng in rngs for question in questions_about(draw_scene(rng, training=True), rng)]
    blind = Blind(seen)
    found, guessed = scores(asked, answers), scores(asked, [blind.answer(each.question) for each in asked])
    if file:
        rows = [
            {"clip": each.clip.name, "new": each.new, "given": answer, **vars(each.question)}
            for each, answer in zip(asked, answers, strict=True)
        ]
        file.write_text(json.dumps(rows, indent=1))
    Console().print(score_table(found, guessed))
    total, chance = found["all"], guessed["all"]
    print(f"accuracy {total.right / total.asked:.3f} blind {chance.right / chance.asked:.3f} n {total.asked}")


def score_table(found: dict[str, Score], guessed: dict[str, Score]) -> Table:
    """A row for each kind of question."""
    table = Table()
    table.add_column("kind")
    for column in ("questions", "right", "blind", "chance"):
        table.add_column(column, justify="right")
    for kind in (*KINDS, "new", "all"):
        score, blind = found[kind], guessed[kind]
        shares = (score.right, blind.right, score.chance)
        table.add_row(kind, str(score.asked), *(f"{share / score.asked:.3f}" for share in shares))
    return table


def write_examples(folder: Path) -> None:
    """Clips and ``questions.json``: of each kind the first question about a new clip."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        first: dict[str, Asked] = {}
        shown: set[Path] = set()
        for each in held_out_questions(Path(scratch), len(KINDS) * 10, EXAMPLES_SEED):
            if each.question.kind not in first and each.clip not in shown:
                first[each.question.kind] = each
                shown.add(each.clip)
        rows = []
        for kind, each in first.items():
            name = f"{kind.replace(' ', '-')}{each.clip.suffix}"
            shutil.copy(each.clip, folder / name)
            rows.append({"clip": name, "kind": kind, "question": each.question.text, "answer": each.question.answer})
    (folder / "questions.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
