"""What ranks tell each other of a request, so that all of them add up their tokens, or all of them raise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from merv_fast.modules.weighing import MOST_ENCODERS

__all__ = ["Exchange", "Part"]

VIDEOS = 120
"""Videos whose scores fit on a sheet; of a larger batch they are exchanged by themselves."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Part:
    """A rank's part of a request, with all the memory that it takes to add it to the others'.

    Args:
        tokens: ``[B, S, D]`` of the rank's encoders, weighed among themselves; the sum is written over them.
        total: the same in the dtype sums are made in, float32 or float64; ``tokens`` itself if they are of that.
        scores: ``[B, E]`` in that dtype, 0 of other ranks' encoders.
    """

    tokens: Tensor
    total: Tensor
    scores: Tensor


class Line(NamedTuple):
    """What a rank says of a request. Bit e of ``members`` stands for encoder e, ``dtype`` counts in `DTYPES`."""

    request: int
    encoders: int
    members: int
    failed: int
    videos: int
    tokens: int
    width: int
    dtype: int


class Exchange:
    """The collectives of a request: every rank of a group takes part in them, also one on which it has failed.

    First all sum up a sheet, whose shape depends on the size of the group alone: a `Line` of each rank, then a row of
    scores for each video. All read the same on it and so decide alike. If all is well, tokens are summed up, in memory
    that is there already: between the two nothing can fail on some ranks only. The host waits once for its GPU, to read
    the sheet; for more than `VIDEOS` videos, whose scores are a collective of their own, twice.

    Args:
        members: this rank's encoders.
        encoders: E, of all ranks together.
        group: the process group; the default one if not given.
    """

    def __init__(self, members: Sequence[int], encoders: int, group: dist.ProcessGroup | None = None) -> None:
        self.request = 0
        self._members, self._encoders, self._group = list(members), encoders, group
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self._sheet: Tensor | None = None

    def begin(self, request: int | None, device: torch.device) -> None:
        """Make ready for a request, to be followed by `add` or `give_up`.

        Args:
            request: its number, the same on every rank; one more than the last if not given.
            device: where tokens will be.
        """
        self.request = self.request + 1 if request is None else request
        if self._sheet is None or self._sheet.device != device:
            # What is made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                shape = self._ranks + VIDEOS, max(MOST_ENCODERS, len(Line._fields))
                self._sheet = torch.empty(shape, dtype=torch.float64, device=device)
        self._sheet.zero_()

    def give_up(self) -> None:
        """Tell the other ranks that the request has failed on this one."""
        self._sum_sheets(self._line(failed=1))

    def add(self, part: Part) -> tuple[Tensor, Tensor]:
        """The tokens ``[B, S, D]`` of all ranks' parts and the weights ``[B, E]`` of all encoders.

        Raises:
            RuntimeError: the request has failed on other ranks, or is not the same on every rank.
            ValueError: an encoder is on no rank or on several, or shapes or dtypes of tokens differ. Either on every
                rank.
        """
        (B, S, D), E, R = part.tokens.shape, self._encoders, self._ranks
        sheet = self._sum_sheets(self._line(0, B, S, D, DTYPES.index(part.tokens.dtype)), part.scores[:VIDEOS])
        read = sheet.cpu()
        check([Line(*map(int, row[: len(Line._fields)])) for row in read[:R].tolist()])
        scores = read[R : R + B, :E]
        if B > VIDEOS:
            dist.all_reduce(part.scores, group=self._group)
            scores = part.scores.cpu()
        weights = scores.double().softmax(1)
        share = part.scores.view(-1)[:B]
        share.copy_(weights[:, self._members].sum(1), non_blocking=True)
        part.total.mul_(share[:, None, None])
        dist.all_reduce(part.total, group=self._group)
        return part.tokens.copy_(part.total), weights.to(part.total, non_blocking=True)

    def _line(self, failed: int, videos: int = 0, tokens: int = 0, width: int = 0, dtype: int = 0) -> Line:
        members = sum(1 << member for member in self._members)
        return Line(self.request, self._encoders, members, failed, videos, tokens, width, dtype)

    def _sum_sheets(self, line: Line, scores: Tensor | None = None) -> Tensor:
        """The sheet of all ranks; each writes a line and columns of its own, to which others add zeros."""
        sheet, R = self._sheet, self._ranks
        assert sheet is not None
        sheet[self._rank, : len(line)].copy_(torch.tensor(line), non_blocking=True)
        if scores is not None:
            sheet[R : R + scores.shape[0], : scores.shape[1]] = scores
        dist.all_reduce(sheet, group=self._group)
        return sheet


def check(lines: Sequence[Line]) -> None:
    """Raise unless the ranks' parts can be added up; their tokens are summed up only if it returns."""
    numbers = [line.request for line in lines]
    if failed := [str(rank) for rank, line in enumerate(lines) if line.failed]:
        where = f"rank {', '.join(failed)} of {len(lines)}"
        raise RuntimeError(f"RankedEncoders: request {numbers[0]} has failed on {where}, where it raises its own error")
    if len(set(numbers)) > 1:
        raise RuntimeError(f"RankedEncoders: request must be the same on every rank, got {numbers}")
    encoders = [line.encoders for line in lines]
    if len(set(encoders)) > 1:
        raise ValueError(f"RankedEncoders: encoders must be as many on every rank, got {encoders}")
    counts = [sum(line.members >> e & 1 for line in lines) for e in range(encoders[0])]
    if set(counts) != {1}:
        rule = "the same on every rank, so that each encoder is on one"
        raise ValueError(f"RankedEncoders: costs must be {rule}, got encoders on {counts} ranks")
    if len({line[4:] for line in lines}) > 1:
        got = "; ".join(f"{[line.videos, line.tokens, line.width]} {DTYPES[line.dtype]}" for line in lines)
        raise ValueError(f"RankedEncoders: tokens must have one shape and dtype on every rank, got {got}")
