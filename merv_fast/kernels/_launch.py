"""Which of a kernel's launch choices the current GPU takes, and what a call costs at least."""

from typing import NamedTuple

import triton

__all__ = ["Cost", "capability"]


def capability() -> int:
    """The architecture whose launch choices apply: 80, 90 or 100.

    80 stands for every GPU without Hopper's or Blackwell's matrix instructions; its choices fit the 99 KiB of
    shared memory of sm_86, sm_89 and sm_120. The interpreter takes it too.
    """
    if triton.knobs.runtime.interpret:
        return 80
    return {9: 90, 10: 100}.get(triton.runtime.driver.active.get_current_target().arch // 10, 80)


class Cost(NamedTuple):
    """What a call must do at least: floating-point operations, and bytes through device memory."""

    flops: int
    bytes: int
