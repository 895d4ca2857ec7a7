"""Which reference pictures of H.264 need not be decoded, since nothing that is wanted is decoded from them.

An encoder that marks a picture as a reference does not use it for every later one: the lists of their slices tell
(ITU-T H.264, 8.2.4). But a decoder that does not get a reference picture holds others afterwards, in another order. So
it gets one in its place that marks the same and costs next to nothing, and no later picture's lists change.
"""

from collections.abc import Iterable, Iterator, Sequence, Set
from typing import NamedTuple

from merv_fast.video.h264 import (
    PictureSet,
    SequenceSet,
    Slice,
    Unknown,
    is_picture_set,
    read_slice,
    skipped_slice,
    skipping_set,
)

__all__ = ["References"]

SPARSE = 2
"""Pictures for each wanted one, at least, if looking into them is to pay."""

LEAST_MACROBLOCKS = 900
"""Of a picture, for the same reason: to look into one takes as long as to decode some twenty."""


class Reference(NamedTuple):
    """A picture that a decoder holds; ``order`` is that of output."""

    frame_num: int
    order: int
    position: int


class Buffer(NamedTuple):
    """What a decoder holds: references, the latest first, and of the latest the two parts of its order of output."""

    references: tuple[Reference, ...]
    high: int
    low: int


class References:
    """The reference pictures of a stream.

    Args:
        sequence: Its sequence parameter set.
        sets: Its picture parameter sets by their number.
        heads: [packets] the beginnings of the slices of each, none where they are not known.
    """

    def __init__(self, sequence: SequenceSet, sets: dict[int, PictureSet], heads: Sequence[tuple[bytes, ...]]) -> None:
        self._sequence, self._sets, self._heads = sequence, sets, heads
        self._frame_nums, self._orders = 1 << sequence.frame_num_bits, 1 << sequence.order_bits
        self._free = next(number for number in range(len(sets) + 1) if number not in sets)
        self._skipping = skipping_set(self._free, sequence)

    @classmethod
    def of_stream(cls, units: Iterable[bytes], heads: Sequence[tuple[bytes, ...]]) -> "References | None":
        """From all parameter sets of a stream; None where they change or are of a kind that few encoders write."""
        distinct = frozenset(units)
        try:
            (sequence,) = (SequenceSet.read(unit) for unit in distinct if not is_picture_set(unit))
            sets = [PictureSet.read(unit) for unit in distinct if is_picture_set(unit)]
        except (Unknown, ValueError):
            return None
        known = sequence.frames_only and not sequence.planes_apart and sequence.order_kind == 0
        known &= max(sequence.frame_num_bits, sequence.order_bits, sequence.references) <= 16
        numbers = {each.number: each for each in sets if each.sequence == sequence.number and each.number < 32}
        return cls(sequence, numbers, heads) if known and len(numbers) == len(sets) < 32 else None

    def stand_ins(self, positions: Sequence[int], wanted: Set[int]) -> dict[int, list[bytes]]:
        """Units to decode in the place of those packets at ``positions`` that nothing ``wanted`` is decoded from.

        Decoding begins with the first, and everything left out between them is no reference.
        """
        if len(positions) < SPARSE * len(wanted) or self._sequence.macroblocks < LEAST_MACROBLOCKS:
            return {}
        try:
            slices = {position: self._slices(position) for position in positions}
            used = dict(zip(positions, self._used(slices), strict=True))
        except Unknown:
            return {}
        needed = set(wanted)
        for position in reversed(positions):
            if slices[position][0].picture.idr:
                needed.add(position)
            if position in needed:
                needed |= used[position]
        return {
            position: [self._skipping, skipped_slice(self._free, self._sequence, slices[position][0].picture)]
            for position in positions
            if position not in needed
        }

    def _slices(self, position: int) -> list[Slice]:
        """The slices of a packet, which must be those of one picture."""
        slices = [read_slice(head, self._sequence, self._sets) for head in self._heads[position]]
        if [each.first for each in slices] != [place == 0 for place in range(max(len(slices), 1))]:
            raise Unknown("no picture, or two")
        if any(each.picture != slices[0].picture for each in slices):
            raise Unknown("slices that do not agree")
        return slices

    def _used(self, slices: dict[int, list[Slice]]) -> Iterator[set[int]]:
        """Of each picture, those in the lists of its slices."""
        buffer = None
        for position, those in slices.items():
            picture = those[0].picture
            if picture.idr and not picture.frame_num:
                buffer = Buffer((), 0, picture.order)
            elif picture.idr or not buffer or not buffer.references:
                raise Unknown("what the decoder holds at first")
            elif (picture.frame_num - buffer.references[0].frame_num) % self._frame_nums != 1:
                raise Unknown("a gap")
            # 8.2.1.1
            step = picture.order - buffer.low
            high = buffer.high + self._orders * ((2 * step <= -self._orders) - (2 * step > self._orders))
            order = high + picture.order + min(picture.bottom, 0)
            if any(each.order == order or each.frame_num == picture.frame_num for each in buffer.references):
                raise Unknown("two pictures with one number")
            yield {entry.position for each in those for entry in self._entries(each, buffer.references, order)}
            if picture.reference:
                current = Reference(picture.frame_num, order, position)
                buffer = Buffer(self._mark(buffer.references, current, picture.removals), high, picture.order)

    def _mark(
        self, references: tuple[Reference, ...], current: Reference, removals: tuple[int, ...] | None
    ) -> tuple[Reference, ...]:
        """The references once ``current`` is one (8.2.5.3, 8.2.5.4.1)."""
        size = max(self._sequence.references, 1)
        if removals is None:
            return current, *references[: size - 1]
        gone = {(current.frame_num - removal) % self._frame_nums for removal in removals}
        kept = [each for each in references if each.frame_num not in gone]
        if len(kept) + len(gone) != len(references) or len(kept) >= size:
            raise Unknown("a marking of what is not there, or of too little")
        return current, *kept

    def _entries(self, each: Slice, references: tuple[Reference, ...], order: int) -> Iterator[Reference]:
        """Those of the reference picture lists of a slice (8.2.4)."""
        initial = initial_lists(references, order) if len(each.counts) == 2 else [references]
        for known, count, steps in zip(initial, each.counts, each.modifications, strict=False):
            entries = list(known[:count])
            frame_num, whole = each.picture.frame_num, True
            for place, step in enumerate(steps):
                frame_num = (frame_num + step) % self._frame_nums
                others = [entry for entry in entries[place:] if entry.frame_num != frame_num]
                found = [reference for reference in references if reference.frame_num == frame_num]
                entries[place:] = [*found, *others][: count - place]
                whole &= len(found) == 1
            if not whole or len(entries) < count:
                raise Unknown("an entry without a picture")
            yield from entries


def initial_lists(references: Sequence[Reference], order: int) -> list[Sequence[Reference]]:
    """Those of a B slice, by the order of output (8.2.4.2.3)."""
    ascending = sorted(references, key=lambda reference: reference.order)
    behind = [reference for reference in reversed(ascending) if reference.order < order]
    ahead = [reference for reference in ascending if reference.order > order]
    first, second = [*behind, *ahead], [*ahead, *behind]
    if first == second and len(first) > 1:
        second[:2] = second[1], second[0]
    return [first, second]
