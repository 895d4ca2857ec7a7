"""Files that come with the package: the model ``merv-tiny``, a short clip, and clips that the model is asked about."""

import json
from pathlib import Path
from typing import NamedTuple

__all__ = ["Example", "examples", "sample_clip"]

FOLDER = Path(__file__).parent


class Example(NamedTuple):
    """A bundled clip, a question about it of one kind, and the right answer."""

    clip: Path
    kind: str
    question: str
    answer: str


def sample_clip() -> Path:
    """Path of the bundled clip: 4 s, 320 x 240, H.264; a red ball crosses a room while a blue box rises."""
    return FOLDER / "clip.mp4"


def examples() -> list[Example]:
    """A clip of coloured shapes for each kind of question that ``merv-tiny`` was trained to answer."""
    listed = json.loads((FOLDER / "examples/questions.json").read_text(encoding="utf-8"))
    return [Example(FOLDER / "examples" / each.pop("clip"), **each) for each in listed]
