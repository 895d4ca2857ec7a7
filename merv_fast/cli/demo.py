"""demo: the bundled clips, what is asked about them, and what the bundled model answers."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from merv_fast.assets import examples
from merv_fast.cli.ask import Loader, waiting

__all__ = ["show_demo"]


def show_demo(loader: Loader) -> bool:
    """A row for each bundled clip; whether all answers are right."""
    console = Console()
    with waiting(f"loading {loader.model}"):
        vidlm = loader.load()
    table = Table(title=f"{vidlm.model_id} on {vidlm.device}", title_justify="left", show_lines=True)
    for column in ("clip", "question", "answer", "right answer"):
        table.add_column(column)
    table.add_column("ms", justify="right")
    right = 0
    for example in examples():
        builder = vidlm.get_prompt_builder()
        builder.add_turn(role="human", message=example.question)
        with waiting(example.question.splitlines()[0]):
            (answer,) = vidlm.answer(example.clip, builder.get_prompt(), do_sample=False, max_new_tokens=16)
        right += answer.answer == example.answer
        milliseconds = math.fsum(answer.timings_ms.values())
        table.add_row(example.clip.name, example.question, answer.answer, example.answer, f"{milliseconds:.0f}")
    console.print(table)
    console.print(f"{right} of {len(examples())} answers are right")
    return right == len(examples())
