"""What launches share: what the current GPU is and can do, channels without gaps, and what a call costs at least."""

from functools import lru_cache
from typing import NamedTuple

import triton
from torch import Tensor

__all__ = [
    "Cost",
    "capability",
    "cdiv",
    "dependent_launches",
    "power_of_2",
    "processors",
    "unit_stride",
    "wide",
]


def capability() -> int:
    """The architecture whose launch choices apply: 80, 90 or 100.

    80 stands for every GPU without Hopper's or Blackwell's matrix instructions; its choices fit the 99 KiB of
    shared memory of sm_86, sm_89 and sm_120. The interpreter takes it too.
    """
    if triton.knobs.runtime.interpret:
        return 80
    return _capability(triton.runtime.driver.active.get_current_device())


@lru_cache(maxsize=64)
def _capability(device: int) -> int:
    return {9: 90, 10: 100}.get(triton.runtime.driver.active.get_current_target().arch // 10, 80)


def dependent_launches() -> bool:
    """Whether a kernel can be launched before the one in front of it has ended, and wait for it by itself."""
    return capability() >= 90


def processors() -> int:
    """SMs of the current GPU; in the interpreter so few that a persistent program makes several tiles of a test."""
    if triton.knobs.runtime.interpret:
        return 3
    return _processors(triton.runtime.driver.active.get_current_device())


@lru_cache(maxsize=64)
def _processors(device: int) -> int:
    return triton.runtime.driver.active.utils.get_device_properties(device)["multiprocessor_count"]


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up. Triton's own costs microseconds where it is called from Python; so does the next one."""
    return -(-x // y)


def power_of_2(n: int) -> int:
    """The least that is not below ``n``, from 1 on."""
    return 1 << (n - 1).bit_length()


def wide(*tensors: Tensor) -> bool:
    """Whether 16 divides addresses, strides and widths, which is all that Triton knows of them: loads are then wide."""
    return all(size % 16 == 0 for x in tensors for size in (x.data_ptr(), x.shape[-1], *x.stride()[:-1]))


def unit_stride(x: Tensor) -> Tensor:
    """``x``, copied if its channels are not next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Cost(NamedTuple):
    """What a call must do at least: floating-point operations, and bytes through device memory."""

    flops: int
    bytes: int
