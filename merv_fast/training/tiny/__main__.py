"""Make merv-tiny, and measure it: ``python -m merv_fast.training.tiny train FOLDER``, ``eval``, ``weights FOLDER``,
``ablate FOLDER``, ``examples FOLDER``.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from merv_fast.models import MervModel, load_vid
from merv_fast.training.tiny.ablating import VARIANTS, ablate
from merv_fast.training.tiny.answering import Score
from merv_fast.training.tiny.evaluation import Asked, Blind, ask_all, held_out_questions, scores
from merv_fast.training.tiny.questions import KINDS, UNKNOWN, questions_about
from merv_fast.training.tiny.recipe import Run
from merv_fast.training.tiny.scenes import draw_scene
from merv_fast.training.tiny.weighing import activating, by_theme, weigh
from merv_fast.video.drawing import png

TRAINING_SEED, EVALUATION_SEED, EXAMPLES_SEED, WEIGHTS_SEED = 1, 2, 3, 4


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
    parts = commands.add_parser("ablate", help="the same with other parts, from the encoders of a training run")
    parts.add_argument("folder", type=Path, help="of the run; scores go to ablations.json in it")
    parts.add_argument("--epochs", type=int, default=1, help="how often a clip is asked about (default %(default)s)")
    parts.add_argument("--clips", type=int, default=800, help="new ones to ask about (default %(default)s)")
    chosen = commands.add_parser("examples", help="for each kind of question a new clip, about which it is right")
    chosen.add_argument("folder", type=Path)
    chosen.add_argument("--model", default="merv-tiny", help="a directory, or %(default)s")
    weights = commands.add_parser("weights", help="encoders' weights by theme; the clips that most activate each")
    weights.add_argument("folder", type=Path, help="for a picture of each encoder")
    weights.add_argument("--model", default="merv-tiny", help="a directory, or %(default)s")
    weights.add_argument("--clips", type=int, default=40, help="of each theme (default %(default)s)")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if given.command == "train":
        save_in_half(Run(given.folder, given.seed, given.clips)(), given.folder / "model")
    elif given.command == "eval":
        report(given.model, given.questions, given.json)
    elif given.command == "ablate":
        compare(Run(given.folder), given.epochs, given.clips)
    elif given.command == "weights":
        draw_weights(given.model, given.folder, given.clips)
    else:
        with TemporaryDirectory() as scratch:
            asked = held_out_questions(Path(scratch), len(KINDS) * 20, EXAMPLES_SEED)
            write_examples(given.folder, asked, ask_all(load_vid(given.model), asked))


def save_in_half(vidlm: MervModel, folder: Path) -> None:
    """Weights in bfloat16, which those who load them compute with in float32."""
    vidlm.to("cpu", dtype=torch.bfloat16)
    vidlm.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"dtype": "float32"}
    file.write_text(json.dumps(config, indent=2) + "\n")


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


def compare(run: Run, epochs: int, count: int) -> None:
    """Train all variants, and print how many answers are right; kinds count alike in the mean, and all are kept."""
    table = Table("variant")
    for column in ("visual tokens", "mean", "worst"):
        table.add_column(column, justify="right")
    table.add_column("of")
    rows = {}
    for name, ablation in zip(VARIANTS, ablate(run, count, EVALUATION_SEED, epochs), strict=True):
        shares = {kind: ablation.scores[kind].right / ablation.scores[kind].asked for kind in KINDS}
        shares["mean"] = sum(shares.values()) / len(shares)
        asked = sum(score.asked for score in ablation.scores.values())
        rows[name] = {"visual tokens": ablation.tokens, "questions": asked, **shares}
        (run.folder / "ablations.json").write_text(json.dumps(rows, indent=1))
        worst = min(shares, key=lambda kind: shares[kind])
        table.add_row(name, str(ablation.tokens), f"{shares['mean']:.3f}", f"{shares[worst]:.3f}", worst)
    Console().print(table)


def draw_weights(model: str, folder: Path, each: int) -> None:
    """Print encoders' weights by theme, and draw the clips that most activate each."""
    folder.mkdir(parents=True, exist_ok=True)
    table = Table("theme")
    with TemporaryDirectory() as scratch:
        weighed = weigh(load_vid(model), Path(scratch), each, WEIGHTS_SEED)
        for name in weighed[0].weights:
            table.add_column(name, justify="right")
            (folder / f"merv-tiny-{name}.png").write_bytes(png(activating(weighed, name)))
    for theme, weights in by_theme(weighed).items():
        table.add_row(theme, *(f"{weight:.3f}" for weight in weights.values()))
    Console().print(table)


def write_examples(folder: Path, asked: Sequence[Asked], answers: Sequence[str]) -> None:
    """Clips and ``questions.json``: of each kind the first question that was answered, and rightly.

    Of every other kind it is multiple choice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    right = [each for each, answer in zip(asked, answers, strict=True) if answer == each.question.answer != UNKNOWN]
    first: dict[str, Asked] = {}
    for place, kind in enumerate(KINDS):
        alike = [each for each in right if each.question.kind == kind and each.question.is_choice == bool(place % 2)]
        shown = {each.clip for each in first.values()}
        first[kind] = next(each for each in alike if each.clip not in shown)
    rows = []
    for kind, each in first.items():
        name = f"{kind.replace(' ', '-')}{each.clip.suffix}"
        shutil.copy(each.clip, folder / name)
        rows.append({"clip": name, "kind": kind, "question": each.question.text, "answer": each.question.answer})
    (folder / "questions.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
