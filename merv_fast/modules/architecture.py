"""The reference's ``arch_specifier`` strings, parsed once."""

import re
from dataclasses import dataclass

__all__ = ["Architecture"]

RESAMPLERS = ("none", "avg", "3davg", "attntv", "conv", "3dconv")
MLPS = ("linear", "gelu-mlp", "fused-gelu-mlp", "none")
OVER_TIME = ("3davg", "3dconv")


@dataclass(frozen=True)
class Architecture:
    """What each encoder's tokens go through before fusion.

    ``resampler`` is one of ``none``, ``avg``, ``3davg``, ``attntv``, ``conv``, ``3dconv``; ``mlp`` is one of
    ``linear``, ``gelu-mlp``, ``fused-gelu-mlp``, ``none``; the slots are divided by ``frame_divisor``.

    >>> Architecture.parse("no-align+3davg+frame2+linear")
    Architecture(resampler='3davg', mlp='linear', frame_divisor=2)
    """

    resampler: str
    mlp: str
    frame_divisor: int = 1

    @classmethod
    def parse(cls, arch_specifier: str) -> "Architecture":
        """Read a ``+``-joined specifier: ``[no-align+][resampler+][frame<k>+]mlp``, the MLP last.

        Raises ``ValueError`` for unknown or repeated words, no MLP, ``frame<k>`` without a resampler over
        time, and ``none`` for both resampler and MLP.
        """

        def refuse(rule: str) -> ValueError:
            return ValueError(f"build_projector: arch_specifier must {rule}, got {arch_specifier!r}")

        *words, mlp = arch_specifier.split("+")
        if mlp not in MLPS:
            raise refuse(f"end with one of {', '.join(MLPS)}")
        resamplers, divisors = [], []
        for word in words:
            frames = re.fullmatch(r"frame(\d+)", word)
            if word in RESAMPLERS:
                resamplers.append(word)
            elif frames:
                divisors.append(int(frames[1]))
            elif word != "no-align":
                raise refuse(f"be made of no-align, {', '.join(RESAMPLERS)}, frame<k> and an MLP")
        if len(resamplers) > 1 or len(divisors) > 1:
            raise refuse("name at most one resampler and one frame<k>")
        resampler = resamplers[0] if resamplers else "none"
        divisor = divisors[0] if divisors else 1
        if divisors and (divisor < 1 or resampler not in OVER_TIME):
            raise refuse(f"use frame<k> with k >= 1 and one of {', '.join(OVER_TIME)}")
        if resampler == mlp == "none":
            raise refuse("name a resampler, an MLP or both")
        return cls(resampler, mlp, divisor)
