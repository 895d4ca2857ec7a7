"""Questions and answers as the reference's evaluation scripts read them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Question", "choice_prompt", "read_questions"]

LETTERS = "ABCDE"


@dataclass(frozen=True)
class Question:
    """One question.

    Args:
        key: ``question_id``, which no other question has.
        video: the file, or folder of frames.
        text: what is asked, with its options if it has any.
        answer: the right one; a letter where there are options.
        clip: bounds as ``MervModel.answer`` takes them.
        row: everything that the two files say of it.
    """

    key: str
    video: Path
    text: str
    answer: str
    clip: tuple[tuple[str, float], ...]
    row: Mapping[str, Any]

    @property
    def is_choice(self) -> bool:
        """Whether there are options to choose from."""
        return "options" in self.row

    def is_right(self, prediction: str) -> bool:
        """Of options, whether the first letter is the right one, as in the reference; else whether the words are."""
        if self.is_choice:
            return prediction.lower()[:1] == self.answer.lower()
        return words(prediction) == words(self.answer)


def words(text: str) -> list[str]:
    """Without case, punctuation and articles."""
    kept = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    return [word for word in kept if word not in ("a", "an", "the")]


def choice_prompt(question: str, options: Sequence[str], count: int) -> str:
    """A question of multiple choice as MERV was evaluated with it, the four spaces before the first option included.

    Source: ``scripts/eval_mcq.py`` of the reference.
    """
    letters = ", ".join(LETTERS[:count])
    choices = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    rule = f"Write your answer as only one of {letters} and nothing else."
    return f"{question} Select the correct answer from the following options. {rule}\n\n    {choices}"


def read_questions(folder: str | Path, questions: str = "test_q", answers: str = "test_a") -> list[Question]:
    """The questions of a data set in the reference's layout, in the order of their file.

    Args:
        folder: with ``<questions>.json``, ``<answers>.json`` and ``videos/``.
        questions: name of the file of questions: a list of ``question_id``, ``question``, ``video_name`` (without its
            suffix) and, of multiple choice, ``options`` and ``num_option``; perhaps ``time`` [start, end] in seconds or
            ``end_frame``.
        answers: name of the file of answers: a list of ``question_id``, ``answer``, of multiple choice ``answer_id``.

    Raises:
        ValueError: the files cannot be read, an entry lacks something, or a question has no answer or no video; the
            message names the entry.
    """
    folder = Path(folder)
    asked, answered = (entries(folder / f"{name}.json") for name in (questions, answers))
    right = {str(entry["question_id"]): entry for entry in answered}
    repeated = [key for key, count in Counter(str(entry["question_id"]) for entry in asked).items() if count > 1]
    if repeated:
        raise ValueError(f"{folder}: question_id must be different for each question, got {repeated[0]} twice")
    files = videos_by_name(folder / "videos")
    return [question(folder, entry, right, files) for entry in asked]


def entries(path: Path) -> list[dict[str, Any]]:
    """The list in a file, each with its ``question_id``."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(found, list):
        raise ValueError(f"{path}: must hold a list, got {type(found).__name__}")
    for place, entry in enumerate(found):
        if not isinstance(entry, dict) or "question_id" not in entry:
            raise ValueError(f"{path}: entry {place} must have a question_id")
    return found


def videos_by_name(folder: Path) -> dict[str, Path]:
    """Files by name without suffix, and folders of frames; of several with one name the first."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        # A folder wins, as in the reference.
        if path.is_dir():
            found[path.name] = path
        else:
            found.setdefault(path.name.partition(".")[0], path)
            found.setdefault(path.stem, path)
    return found


def question(
    folder: Path, entry: dict[str, Any], right: Mapping[str, Mapping[str, Any]], files: Mapping[str, Path]
) -> Question:
    key = str(entry["question_id"])

    def need(value: Mapping[str, Any], name: str) -> Any:
        if name not in value:
            raise ValueError(f"{folder}: question {key} must have {name}")
        return value[name]

    if key not in right:
        raise ValueError(f"{folder}: question {key} must have an answer")
    name = need(entry, "video_name")
    if name not in files:
        raise ValueError(f"{folder}: question {key} must have its video {name} in {folder / 'videos'}")
    text, answer = need(entry, "question"), str(right[key].get("answer", ""))
    if "options" in entry:
        number, count = need(right[key], "answer_id"), need(entry, "num_option")
        if not 0 <= number < len(entry["options"]) <= len(LETTERS):
            raise ValueError(f"{folder}: question {key} must have its answer_id among at most {len(LETTERS)} options")
        text, answer = choice_prompt(text, entry["options"], count), LETTERS[number]
    return Question(key, files[name], text, answer, tuple(clip_of(entry).items()), entry | dict(right[key]))


def clip_of(entry: Mapping[str, Any]) -> dict[str, float]:
    """Where the clip is; bounds that are not numbers count as not given, as in the reference."""
    start, end = entry.get("time") or (None, None)
    bounds = {"clip_start_sec": start, "clip_end_sec": end, "end_frame": entry.get("end_frame")}
    return {name: value for name, value in bounds.items() if value is not None and not math.isnan(value)}
