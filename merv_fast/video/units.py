"""What the units of H.264 and HEVC packets tell without decoding them."""

from collections.abc import Iterable, Iterator, Sequence

__all__ = [
    "UNIT_CODECS",
    "are_frames",
    "in_record",
    "layer_of",
    "parameter_sets",
    "promises_recovery",
    "random_access",
    "sequence_sets",
    "units_of",
]

START = b"\0\0\1"
PICTURE_DATA = {"h264": range(1, 6), "hevc": range(32)}
PARAMETER_SETS = {"h264": (7, 8), "hevc": (32, 33, 34)}
UNREFERENCED = range(0, 15, 2)

UNIT_CODECS = frozenset(PICTURE_DATA)

HIGH_PROFILES = frozenset({44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 144, 244})


def units_of(data: bytes, codec: str, extradata: bytes | None) -> Iterator[bytes]:
    """The units of a packet's ``data``."""
    # After a configuration record, which starts with its version 1, units have length prefixes; else start codes.
    record = (extradata or b"").ljust(22, b"\0")
    length = (record[4 if codec == "h264" else 21] & 3) + 1 if record[0] == 1 else 0
    place = 0 if length else data.find(START)
    while 0 <= place < len(data):
        begin = place + (length or len(START))
        place = begin + int.from_bytes(data[place:begin], "big") if length else data.find(START, begin)
        unit = data[begin : None if place < 0 else place]
        if not unit:
            return
        yield unit


def in_record(extradata: bytes | None) -> list[bytes]:
    """The sequence parameter sets of H.264 that stand in the configuration record, or before the first packet."""
    data = extradata or b""
    if data[:1] != b"\1":
        return [unit for unit in units_of(data, "h264", None) if unit_kind(unit, "h264") == 7]
    found, place = [], 6
    for _ in range(data[5] & 31 if len(data) > 5 else 0):
        size = int.from_bytes(data[place : place + 2], "big")
        found.append(data[place + 2 : place + 2 + size])
        place += 2 + size
    return found


def leading_units(units: Sequence[bytes], codec: str) -> Iterator[bytes]:
    """Those up to the first that holds picture data, which comes last."""
    for unit in units:
        yield unit
        if unit_kind(unit, codec) in PICTURE_DATA[codec]:
            return


def layer_of(units: Sequence[bytes], codec: str) -> tuple[int, bool]:
    """The temporal layer of a packet's picture, and whether others of that layer may be decoded from it.

    By ``nal_ref_idc`` of H.264; in HEVC by the kinds of units that are sub-layer non-reference pictures.
    """
    pictures = [unit for unit in units if unit_kind(unit, codec) in PICTURE_DATA[codec]]
    if codec == "h264":
        return 0, not pictures or any(unit[0] & 0x60 for unit in pictures)
    layer = max((unit[1] & 7 for unit in pictures if len(unit) > 1), default=0)
    return layer, not pictures or any(unit_kind(unit, codec) not in UNREFERENCED for unit in pictures)


def unit_kind(unit: bytes, codec: str) -> int:
    """``nal_unit_type`` (ITU-T H.264, table 7-1; H.265, table 7-1)."""
    return unit[0] & 31 if codec == "h264" else unit[0] >> 1 & 63


def parameter_sets(units: Sequence[bytes], codec: str) -> frozenset[int]:
    """Kinds of the parameter sets that stand before the picture data of a packet."""
    kinds = (unit_kind(unit, codec) for unit in leading_units(units, codec))
    return frozenset(kind for kind in kinds if kind in PARAMETER_SETS[codec])


def sequence_sets(units: Sequence[bytes]) -> Iterator[bytes]:
    """The sequence parameter sets of H.264 among ``units``."""
    return (unit for unit in units if unit_kind(unit, "h264") == 7)


def random_access(units: Sequence[bytes], codec: str) -> bool:
    """Whether a key frame's packet promises that every frame shown with or after it decodes without earlier ones."""
    leading = list(leading_units(units, codec))
    kind = unit_kind(leading[-1], codec) if leading else -1
    if codec == "hevc":
        return 16 <= kind <= 21
    return kind == 5 or any(promises_recovery(unit) for unit in leading)


def promises_recovery(unit: bytes) -> bool:
    """Whether an H.264 unit is a message that from this picture on, in output order, all are exactly right.

    That is a recovery point with ``recovery_frame_cnt`` 0 and ``exact_match_flag`` 1 (ITU-T H.264, D.1.8).
    """
    if unit_kind(unit, "h264") != 6:
        return False
    # The zero ends a run of 255 that goes on to the end.
    data = payload(unit) + b"\0"
    place = 0
    while place + 2 < len(data):
        kind = size = 0
        while place < len(data) and data[place] == 255:
            kind, place = kind + 255, place + 1
        kind, place = kind + data[place], place + 1
        while place < len(data) and data[place] == 255:
            size, place = size + 255, place + 1
        if place + 1 >= len(data):
            return False
        size, place = size + data[place], place + 1
        if kind == 6:
            # The count's code for 0 is a single 1.
            return data[place] & 0xC0 == 0xC0
        place += size
    return False


def payload(unit: bytes) -> bytes:
    """What an H.264 unit says: without its header and the bytes that keep start codes out of it."""
    return unit[1:].replace(b"\0\0\3", b"\0\0")


def are_frames(sets: Iterable[bytes]) -> bool:
    """Whether the H.264 sequence parameter sets, one at least, all say that every picture is a whole frame."""
    said = [frame_mbs_only(unit) for unit in sets]
    return bool(said) and all(said)


def frame_mbs_only(unit: bytes) -> bool:
    """``frame_mbs_only_flag`` of a sequence parameter set (ITU-T H.264, 7.3.2.1.1); False where it ends before."""
    data = payload(unit)
    bits = Bits(data)
    try:
        bits.skip(24)
        bits.unsigned()
        if data[0] in HIGH_PROFILES:
            chroma_format = bits.unsigned()
            bits.skip(chroma_format == 3)
            bits.unsigned()
            bits.unsigned()
            bits.skip(1)
            if bits.flag():
                for number in range(12 if chroma_format == 3 else 8):
                    if bits.flag():
                        bits.skip_scaling_list(16 if number < 6 else 64)
        bits.unsigned()
        match bits.unsigned():
            case 0:
                bits.unsigned()
            case 1:
                bits.skip(1)
                bits.unsigned()
                bits.unsigned()
                for _ in range(bits.unsigned()):
                    bits.unsigned()
        bits.unsigned()
        bits.skip(1)
        bits.unsigned()
        bits.unsigned()
        return bits.flag()
    except IndexError:
        return False


class Bits:
    """Reads ``data`` from its first bit on; raises IndexError after the last."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def skip(self, count: int) -> None:
        self._place += count

    def flag(self) -> bool:
        byte, bit = divmod(self._place, 8)
        self._place += 1
        return bool(self._data[byte] >> 7 - bit & 1)

    def unsigned(self) -> int:
        """An Exp-Golomb code, ue(v)."""
        zeros = 0
        while not self.flag():
            zeros += 1
        value = 1
        for _ in range(zeros):
            value = 2 * value + self.flag()
        return value - 1

    def skip_scaling_list(self, size: int) -> None:
        scale = 8
        for _ in range(size):
            code = self.unsigned()
            scale = (scale + (code + 1 >> 1) * (1 if code % 2 else -1)) % 256
            # The rest repeats the one before.
            if not scale:
                break
