"""What H.264's parameter sets and slice headers say of the pictures that others are decoded from (ITU-T H.264, 7.3)."""

from collections.abc import Mapping
from typing import NamedTuple

__all__ = [
    "Picture",
    "PictureSet",
    "SequenceSet",
    "Slice",
    "Unknown",
    "is_picture_set",
    "payload",
    "read_slice",
    "skipped_slice",
    "skipping_set",
]

HIGH_PROFILES = frozenset({44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 144, 244})

MOST_ENTRIES = 32
"""Of a reference picture list (7.4.3)."""


class Unknown(Exception):
    """Something that is not understood here, or damaged."""


def payload(unit: bytes) -> bytes:
    """What a unit says: without its header and the bytes that keep start codes out of it."""
    return unit[1:].replace(b"\0\0\3", b"\0\0")


def is_picture_set(unit: bytes) -> bool:
    """Whether a parameter set is one of pictures, not of a sequence."""
    return unit != b"" and unit[0] & 31 == 8


class Bits:
    """Reads ``data`` from its first bit on; raises `Unknown` after the last."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def fixed(self, size: int) -> int:
        """An unsigned integer of ``size`` bits, u(n)."""
        self._left -= size
        if self._left < 0:
            raise Unknown("the data end too early")
        return self._value >> self._left & (1 << size) - 1

    def flag(self) -> bool:
        """One bit."""
        return self.fixed(1) == 1

    def unsigned(self) -> int:
        """An Exp-Golomb code, ue(v)."""
        zeros = self._left - (self._value & (1 << self._left) - 1).bit_length()
        return self.fixed(2 * zeros + 1) - 1

    def signed(self) -> int:
        """A signed Exp-Golomb code, se(v)."""
        code = self.unsigned()
        return (code + 1 >> 1) * (1 if code % 2 else -1)


class SequenceSet(NamedTuple):
    """Of a sequence parameter set (7.3.2.1.1)."""

    number: int
    chroma: bool
    planes_apart: bool
    frame_num_bits: int
    order_kind: int
    order_bits: int
    references: int
    macroblocks: int
    frames_only: bool

    @classmethod
    def read(cls, unit: bytes) -> "SequenceSet":
        """Raises `Unknown` where the unit ends before."""
        bits = Bits(payload(unit))
        profile = bits.fixed(8)
        bits.fixed(16)
        number = bits.unsigned()
        chroma_format, planes_apart = 1, False
        if profile in HIGH_PROFILES:
            chroma_format = bits.unsigned()
            planes_apart = chroma_format == 3 and bits.flag()
            bits.unsigned()
            bits.unsigned()
            bits.fixed(1)
            if bits.flag():
                for place in range(12 if chroma_format == 3 else 8):
                    if bits.flag():
                        skip_scaling_list(bits, 16 if place < 6 else 64)
        frame_num_bits = bits.unsigned() + 4
        order_kind, order_bits = bits.unsigned(), 0
        if order_kind == 0:
            order_bits = bits.unsigned() + 4
        elif order_kind == 1:
            bits.fixed(1)
            bits.signed()
            bits.signed()
            for _ in range(bits.unsigned()):
                bits.signed()
        references = bits.unsigned()
        bits.fixed(1)
        # Of a frame, if there are frames only.
        macroblocks = (bits.unsigned() + 1) * (bits.unsigned() + 1)
        return cls(
            number=number,
            chroma=chroma_format > 0,
            planes_apart=planes_apart,
            frame_num_bits=frame_num_bits,
            order_kind=order_kind,
            order_bits=order_bits,
            references=references,
            macroblocks=macroblocks,
            frames_only=bits.flag(),
        )


def skip_scaling_list(bits: Bits, size: int) -> None:
    """Read over a list of the quantizer (7.3.2.1.1.1)."""
    scale = 8
    for _ in range(size):
        scale = (scale + bits.signed()) % 256
        # The rest repeats the one before.
        if not scale:
            break


class PictureSet(NamedTuple):
    """Of a picture parameter set (7.3.2.2)."""

    number: int
    sequence: int
    bottom_order: bool
    counts: tuple[int, int]
    weighted: bool
    weighted_both: bool
    redundant: bool

    @classmethod
    def read(cls, unit: bytes) -> "PictureSet":
        """Raises `Unknown` where the unit ends before, or has slice groups."""
        bits = Bits(payload(unit))
        number, sequence = bits.unsigned(), bits.unsigned()
        bits.fixed(1)
        bottom_order = bits.flag()
        if bits.unsigned():
            raise Unknown("slice groups")
        counts = bits.unsigned() + 1, bits.unsigned() + 1
        weighted, weighted_both = bits.flag(), bits.fixed(2) == 1
        for _ in range(3):
            bits.signed()
        bits.fixed(2)
        return cls(number, sequence, bottom_order, counts, weighted, weighted_both, bits.flag())


class Picture(NamedTuple):
    """What all slices of a picture have in common.

    Attributes:
        idr: Whether it is decoded without others, as are all that follow.
        reference: Whether others may be decoded from it.
        frame_num: As in 7.4.3.
        order: ``pic_order_cnt_lsb``.
        bottom: ``delta_pic_order_cnt_bottom``.
        removals: How far back ``frame_num`` of the references lies that are marked as unused afterwards, or None
            where the oldest gives way.
    """

    idr: bool
    reference: bool
    frame_num: int
    order: int
    bottom: int
    removals: tuple[int, ...] | None


class Slice(NamedTuple):
    """A slice header: 0, 1 or 2 reference picture lists for I, P and B slices.

    Attributes:
        picture: Its picture.
        first: Whether it holds the picture's first macroblock.
        counts: [lists] entries.
        modifications: [lists] steps of the picture number from one entry that is put to the front to the next.
    """

    picture: Picture
    first: bool
    counts: tuple[int, ...]
    modifications: tuple[tuple[int, ...], ...]


def read_slice(unit: bytes, sequence: SequenceSet, sets: Mapping[int, PictureSet]) -> Slice:
    """The header of a slice of a frame (7.3.3), of which ``unit`` may be the beginning.

    Raises:
        Unknown: It is damaged or cut short, or has a kind or a reference marking that few encoders write.
    """
    idr, reference = unit[0] & 31 == 5, unit[0] & 0x60 > 0
    bits = Bits(payload(unit))
    first, kind, number = bits.unsigned() == 0, bits.unsigned() % 5, bits.unsigned()
    if kind > 2 or number not in sets:
        raise Unknown("a switching slice or no parameter set")
    own = sets[number]
    # P, B, I
    lists = (1, 2, 0)[kind]
    frame_num = bits.fixed(sequence.frame_num_bits)
    if idr:
        bits.unsigned()
    order = bits.fixed(sequence.order_bits)
    bottom = bits.signed() if own.bottom_order else 0
    if own.redundant and bits.unsigned():
        raise Unknown("a redundant picture")
    if lists == 2:
        bits.fixed(1)
    counts = own.counts[:lists]
    if lists and bits.flag():
        counts = tuple(bits.unsigned() + 1 for _ in counts)
    if any(count > MOST_ENTRIES for count in counts):
        raise Unknown("long lists")
    modifications = tuple(read_modifications(bits, count) for count in counts)
    if own.weighted_both if lists == 2 else lists and own.weighted:
        skip_weights(bits, counts, sequence.chroma)
    removals = read_removals(bits, idr) if reference else None
    return Slice(Picture(idr, reference, frame_num, order, bottom, removals), first, counts, modifications)


def read_modifications(bits: Bits, count: int) -> tuple[int, ...]:
    """Of one list (7.3.3.1)."""
    steps: list[int] = []
    if bits.flag():
        while (operation := bits.unsigned()) != 3:
            if operation > 1 or len(steps) == count:
                raise Unknown("a long-term reference, or more modifications than entries")
            step = bits.unsigned() + 1
            steps.append(step if operation else -step)
    return tuple(steps)


def skip_weights(bits: Bits, counts: tuple[int, ...], chroma: bool) -> None:
    """Read over the table for weighted prediction (7.3.3.2)."""
    bits.unsigned()
    if chroma:
        bits.unsigned()
    for _ in range(sum(counts)):
        for values in (2, 4) if chroma else (2,):
            if bits.flag():
                for _ in range(values):
                    bits.signed()


def read_removals(bits: Bits, idr: bool) -> tuple[int, ...] | None:
    """The marking of decoded reference pictures (7.3.3.3)."""
    if idr:
        bits.fixed(1)
        if bits.flag():
            raise Unknown("a long-term reference")
        return None
    if not bits.flag():
        return None
    removals: list[int] = []
    while operation := bits.unsigned():
        if operation > 1:
            raise Unknown("a long-term reference, or a reset")
        removals.append(bits.unsigned() + 1)
    return tuple(removals)


class Writer:
    """Writes a unit, bit by bit."""

    def __init__(self) -> None:
        self._bits = ""

    def fixed(self, value: int, size: int) -> None:
        """u(n)"""
        self._bits += f"{value:0{size}b}"

    def unsigned(self, *values: int) -> None:
        """ue(v)"""
        for value in values:
            code = f"{value + 1:b}"
            self._bits += "0" * (len(code) - 1) + code

    def signed(self, value: int) -> None:
        """se(v)"""
        self.unsigned(2 * value - 1 if value > 0 else -2 * value)

    def unit(self, header: int) -> bytes:
        """The unit with its header, the bit that ends it (7.3.2.11) and the bytes against start codes (7.4.1.1)."""
        bits = self._bits + "1"
        size = -(-len(bits) // 8)
        unit = bytearray([header])
        for byte in int(bits.ljust(8 * size, "0"), 2).to_bytes(size, "big"):
            if unit[-2:] == b"\0\0" and byte <= 3:
                unit.append(3)
            unit.append(byte)
        return bytes(unit)


def skipping_set(number: int, sequence: SequenceSet) -> bytes:
    """The picture parameter set of `skipped_slice`: entropy coded by CAVLC, lists of one entry."""
    writer = Writer()
    writer.unsigned(number, sequence.number)
    # CAVLC; the order of output of bottom fields too; one slice group, one entry in each list, no weights, quantizers,
    # control of the deblocking filter.
    writer.fixed(0b01, 2)
    writer.unsigned(0, 0, 0)
    writer.fixed(0b000, 3)
    writer.unsigned(0, 0, 0)
    writer.fixed(0b100, 3)
    return writer.unit(0x68)


def skipped_slice(number: int, sequence: SequenceSet, picture: Picture) -> bytes:
    """A whole P picture after which a decoder holds as many references with the same numbers as after ``picture``.

    All its macroblocks are skipped (7.3.4): it repeats the latest reference, which takes next to no time. ``number``
    is that of its `skipping_set`.
    """
    writer = Writer()
    writer.unsigned(0, 0, number)
    writer.fixed(picture.frame_num, sequence.frame_num_bits)
    writer.fixed(picture.order, sequence.order_bits)
    writer.signed(picture.bottom)
    # The list is as long as the set says, and not modified.
    writer.fixed(0b00, 2)
    writer.fixed(picture.removals is not None, 1)
    if picture.removals is not None:
        for removal in picture.removals:
            writer.unsigned(1, removal - 1)
        writer.unsigned(0)
    # The same quantizer, no deblocking filter, the run of skipped macroblocks.
    writer.unsigned(0, 1, sequence.macroblocks)
    return writer.unit(0x61)
