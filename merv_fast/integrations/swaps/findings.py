"""What is found in a module that is not ours, and how it is replaced and given back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from torch import nn

__all__ = ["Finding", "Refusal", "Swap", "install", "own", "remove", "swaps_of"]

INSTALLED = "_merv_fast_swaps"


@dataclass(frozen=True)
class Swap:
    """One method of a module that runs something else.

    Args:
        call: takes the module and what the method is given.
        runs: what runs instead, for people to read.
        why: what made it possible.
        keeps: what ``call`` needs beside the module, set as attributes of it; no submodule, parameter or buffer.
        method: which one is replaced.
    """

    call: Callable[..., Any]
    runs: str
    why: str
    keeps: dict[str, Any] = field(default_factory=dict)
    method: str = "forward"


@dataclass(frozen=True)
class Refusal:
    """Why a module that looks like one of those that can be replaced is left as it is."""

    why: str


Finding = Swap | Refusal
"""What a look at a module gives, if it is of a known kind at all."""


@dataclass(frozen=True)
class Installed:
    """A swap, and what it took the place of in the module's own attributes, if there was anything."""

    swap: Swap
    before: dict[str, Any]


def install(module: nn.Module, swap: Swap) -> None:
    """Let ``module`` run ``swap``, over those that it already runs."""
    own = vars(module)
    names = [swap.method, *swap.keeps]
    before = {name: own[name] for name in names if name in own}
    # Past nn.Module's registers: state dict, parameters and submodules stay what they were.
    own.update(swap.keeps)
    # A bound method, so that a copy of the module calls itself and not the original.
    own[swap.method] = MethodType(swap.call, module)
    own.setdefault(INSTALLED, []).append(Installed(swap, before))


def remove(module: nn.Module) -> int:
    """Give back every method of ``module`` that was replaced; how many there were."""
    own = vars(module)
    installed: list[Installed] = own.pop(INSTALLED, [])
    for each in reversed(installed):
        for name in (each.swap.method, *each.swap.keeps):
            own.pop(name)
        own.update(each.before)
    return len(installed)


def swaps_of(module: nn.Module) -> list[Swap]:
    """What ``module`` runs instead of its own, the last on top."""
    return [each.swap for each in vars(module).get(INSTALLED, [])]


def own(module: nn.Module, name: str) -> Any | None:
    """The attribute that the module itself had, not its class, before anything was installed."""
    for each in vars(module).get(INSTALLED, []):
        if name in (each.swap.method, *each.swap.keeps):
            return each.before.get(name)
    return vars(module).get(name)
