"""How hypothesis draws cases for kernels: the same ones each time, not shrunk, as the interpreter is slow."""

from hypothesis import Phase, settings

__all__ = ["drawn"]


def drawn(examples: int) -> settings:
    """Settings that draw so many cases beside the explicit ones."""
    return settings(
        max_examples=examples, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate), database=None
    )
