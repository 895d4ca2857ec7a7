"""What the units of H.264 and HEVC packets tell without decoding them."""

from collections.abc import Iterable, Iterator, Sequence

from merv_fast.video.h264 import SequenceSet, Unknown, is_picture_set, payload

__all__ = [
    "UNIT_CODECS",
    "are_frames",
    "in_record",
    "layer_of",
    "packet_of",
    "parameter_sets",
    "promises_recovery",
    "random_access",
    "sets_among",
    "slice_heads",
    "units_of",
]

START = b"\0\0\1"
PICTURE_DATA = {"h264": range(1, 6), "hevc": range(32)}
PARAMETER_SETS = {"h264": (7, 8), "hevc": (32, 33, 34)}
UNREFERENCED = range(0, 15, 2)

UNIT_CODECS = frozenset(PICTURE_DATA)

HEAD = 96
"""Bytes of a slice that are kept; the header with the longest tables may have more."""

MOST_SLICES = 8
"""Of a picture whose slices are kept."""


def units_of(data: bytes, codec: str, extradata: bytes | None) -> Iterator[bytes]:
    """The units of a packet's ``data``."""
    length = length_size(codec, extradata)
    place = 0 if length else data.find(START)
    while 0 <= place < len(data):
        begin = place + (length or len(START))
        place = begin + int.from_bytes(data[place:begin], "big") if length else data.find(START, begin)
        unit = data[begin : None if place < 0 else place]
        if not unit:
            return
        yield unit


def packet_of(units: Iterable[bytes], codec: str, extradata: bytes | None) -> bytes:
    """The data of a packet with these units."""
    length = length_size(codec, extradata)
    return b"".join((len(unit).to_bytes(length, "big") if length else START) + unit for unit in units)


def length_size(codec: str, extradata: bytes | None) -> int:
    """Bytes of the length before each unit, or 0 where start codes stand."""
    # Lengths follow a configuration record, which starts with its version 1.
    record = (extradata or b"").ljust(22, b"\0")
    return (record[4 if codec == "h264" else 21] & 3) + 1 if record[0] == 1 else 0


def in_record(extradata: bytes | None) -> list[bytes]:
    """The parameter sets of H.264 that stand in the configuration record, or before the first packet."""
    data = extradata or b""
    if data[:1] != b"\1":
        return list(sets_among(units_of(data, "h264", None)))
    found, place = [], 5
    for mask in (31, 255):
        count = data[place] & mask if len(data) > place else 0
        place += 1
        for _ in range(count):
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


def sets_among(units: Iterable[bytes]) -> Iterator[bytes]:
    """The parameter sets of H.264 among ``units``."""
    return (unit for unit in units if unit_kind(unit, "h264") in PARAMETER_SETS["h264"])


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


def are_frames(sets: Iterable[bytes]) -> bool:
    """Whether the H.264 sequence parameter sets, one at least, all say that every picture is a whole frame."""
    said = [frames_only(unit) for unit in sets if not is_picture_set(unit)]
    return bool(said) and all(said)


def frames_only(unit: bytes) -> bool:
    """``frame_mbs_only_flag`` of a sequence parameter set; False where it ends before."""
    try:
        return SequenceSet.read(unit).frames_only
    except Unknown:
        return False


def slice_heads(units: Sequence[bytes]) -> tuple[bytes, ...]:
    """The beginnings of the slices of an H.264 picture, as far as they say from which others it is decoded.

    None where they may not say all, or where the picture comes with parameter sets, which others need as well.
    """
    kinds = [unit_kind(unit, "h264") for unit in units]
    slices = [unit[:HEAD] for unit, kind in zip(units, kinds, strict=True) if kind in (1, 5)]
    others = (2, 3, 4) if 5 in kinds else (2, 3, 4, *PARAMETER_SETS["h264"])
    return tuple(slices) if len(slices) <= MOST_SLICES and not any(kind in others for kind in kinds) else ()
