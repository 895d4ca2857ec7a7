"""Damaged copies of small clips and pictures, each determined by its number."""

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from merv_fast import sample_clip
from tests.video.clips import panned, write_clip

FRAMES = 24

X264 = {"bf": "2", "g": "6", "threads": "1"}
X265 = {"x265-params": "log-level=none:keyint=6:pools=none:frame-threads=1"}
VP9 = {"deadline": "realtime", "cpu-used": "8", "g": "6", "threads": "1"}
VP8 = {"deadline": "good", "cpu-used": "5", "g": "6", "auto-alt-ref": "1", "threads": "1"}
AV1 = {"preset": "12", "g": "6", "svtav1-params": "lp=1"}
FULL_RANGE = {"pix_fmt": "yuvj420p"}
PICTURE = {"count": 1, "muxer": {"update": "1"}}

# Codec, encoder options, what else `write_clip` takes. With several threads the bytes would hang on their number, and
# the encoder of VP8 may wait for itself.
SEEDS = {
    "h264.mp4": ("libx264", X264, {}),
    "turned.mov": ("libx264", X264, {"rotation": (90, False, False), "muxer": {"movflags": "faststart"}}),
    "fragments.mp4": ("libx264", X264, {"muxer": {"movflags": "frag_keyframe+empty_moov"}}),
    "h264.mkv": ("libx264", X264, {}),
    "h264.ts": ("libx264", X264, {}),
    "wide.ts": ("libx264", X264, {"width": 112}),
    "h264.flv": ("libx264", X264 | {"bf": "0"}, {}),
    "hevc.mp4": ("libx265", X265, {}),
    "hevc.mkv": ("libx265", X265, {"pix_fmt": "yuv420p10le"}),
    "vp9.webm": ("libvpx-vp9", VP9, {}),
    "vp9.mp4": ("libvpx-vp9", VP9, {}),
    "vp8.webm": ("libvpx", VP8, {}),
    "av1.mp4": ("libsvtav1", AV1, {}),
    "mpeg4.avi": ("mpeg4", {"g": "6"}, {}),
    "mpeg2.mpg": ("mpeg2video", {"bf": "2", "g": "6"}, {}),
    "mjpeg.avi": ("mjpeg", {}, FULL_RANGE),
    "msmpeg4.asf": ("msmpeg4", {"g": "6"}, {}),
    "frames.gif": ("gif", {}, {"pix_fmt": "rgb8"}),
    "picture.jpg": ("mjpeg", {}, FULL_RANGE | PICTURE),
    "picture.png": ("png", {}, {"pix_fmt": "rgb24"} | PICTURE),
}

BUNDLED = "bundled.mp4"
"""It takes ten times as long as the others: one mutant in `SPARINGLY` is made from it."""

SPARINGLY = 40

# What structures begin with: elements of Matroska; objects of ASF; parts of GIF; units of H.264; packets of MPEG-PS and
# -TS; segments of JPEG; and by letters, boxes of MP4, chunks of AVI and PNG, the heads of FLV and GIF.
NUMBERS = """
1a45dfa3 18538067 114d9b74 1549a966 2ad7b1 1654ae6b ae 23e383 e0 b0 1f43b675 e7 a3 1c53bb6b bb 1254c367
a1dcab8c b503bf5f 9107dcb7 c0ef19bc 21f904 2c000000 0000000167 000001 000001b3 000001ba 4740 4741 474000
ffc0 ffc4 ffda ffdb ffe0
"""
LETTERS = b"""
ftyp moov mvhd trak tkhd edts elst mdia mdhd hdlr minf stbl stsd avc1 avcC hev1 hvcC av01 av1C stts stss ctts stsc
stsz stco sdtp mvex trex moof mfhd traf tfhd tfdt trun mfra mdat RIFF LIST avih strh strf movi 00dc idx1
IHDR IDAT IEND FLV onMetaData GIF89a NETSCAPE
"""
MARKS = (*map(bytes.fromhex, NUMBERS.split()), *LETTERS.split())

# Around the edges of types, and 4096 x 4096 in halves.
EXTREMES = (
    0,
    1,
    255,
    0x7FFF,
    0xFFFF,
    1 << 16,
    1 << 24,
    0x10001000,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 2,
    (1 << 32) - 1,
)


@dataclass(frozen=True)
class Mutant:
    """A clip ``source``, changed by the mutation ``kind``; ``suffix`` is that of its file."""

    source: str
    kind: str
    suffix: str
    data: bytes


def write_seeds(folder: Path) -> None:
    """Encode `SEEDS` into ``folder``, to the same bytes each time, and put the bundled clip beside them."""
    for name, (codec, options, more) in SEEDS.items():
        more = {"count": FRAMES, "height": 48, "width": 64, "pix_fmt": "yuv420p", "muxer": {}} | more
        frames = panned(more.pop("count"), more["height"], more["width"], more["pix_fmt"])
        muxer = {"fflags": "+bitexact"} | more.pop("muxer")
        write_clip(folder / name, codec, options=options, frames=frames, muxer=muxer, **more)
    (folder / BUNDLED).write_bytes(sample_clip().read_bytes())


def read_seeds(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (*SEEDS, BUNDLED)}


def make_mutant(number: int, seeds: Mapping[str, bytes]) -> Mutant:
    """Mutant ``number``; one in four is changed three times."""
    random = Random(number)
    kind = list(MUTATIONS)[number % len(MUTATIONS)]
    source = BUNDLED if number % SPARINGLY == SPARINGLY - 1 else random.choice(list(SEEDS))
    other = random.choice(list(SEEDS))
    data = seeds[source]
    for _ in range(random.choice((1, 1, 1, 3))):
        data = MUTATIONS[kind](random, data, seeds[other])
    suffix = Path(random.choice((source, source, source, other))).suffix
    return Mutant(source, kind, suffix, data)


def flip(random: Random, data: bytes, other: bytes) -> bytes:
    """Other bytes here and there."""
    out = bytearray(data)
    for _ in range(random.choice((1, 2, 8, 32))):
        out[random.randrange(len(out))] ^= random.randrange(1, 256)
    return bytes(out)


def blot(random: Random, data: bytes, other: bytes) -> bytes:
    """A run of random bytes, or of one."""
    length = random.randrange(1, 257)
    run = random.choice((random.randbytes(length), bytes([random.choice((0, 0xFF))]) * length))
    return overwrite(data, random.randrange(len(data)), run)


def cut_tail(random: Random, data: bytes, other: bytes) -> bytes:
    return data[: random.randrange(1, max(len(data), 2))]


def cut_middle(random: Random, data: bytes, other: bytes) -> bytes:
    start, end = stretch(random, data)
    return data[:start] + data[end:] or data


def repeat(random: Random, data: bytes, other: bytes) -> bytes:
    """A piece again, behind itself or elsewhere."""
    start, end = stretch(random, data)
    place = random.choice((end, random.randrange(len(data))))
    return data[:place] + data[start:end] * random.choice((1, 1, 20)) + data[place:]


def splice(random: Random, data: bytes, other: bytes) -> bytes:
    """The head of another clip in place of this one's, or in front of it."""
    cut = random.randrange(1, max(min(len(other), 2048), 2))
    return other[:cut] + data[random.choice((0, cut)) :]


def empty(random: Random, data: bytes, other: bytes) -> bytes:
    """Zeros in a structure, perhaps from its name on."""
    start = random.choice(find_structure(random, data))
    return overwrite(data, start, bytes(random.choice((4, 16, 64, 512))))


def resize(random: Random, data: bytes, other: bytes) -> bytes:
    """Extreme 32-bit numbers over what follows the name of a structure, or over the size in front of it."""
    for _ in range(random.choice((1, 1, 2, 4))):
        place, after = find_structure(random, data)
        field = random.choice((max(place - 4, 0), *range(after, after + 64, random.choice((1, 4)))))
        number = struct.pack(random.choice("<>") + "I", random.choice(EXTREMES))
        data = overwrite(data, field, number)
    return data


def join(random: Random, data: bytes, other: bytes) -> bytes:
    """Two clips, one behind the other."""
    return data + other


MUTATIONS: dict[str, Callable[[Random, bytes, bytes], bytes]] = {
    "flipped bytes": flip,
    "random run": blot,
    "cut tail": cut_tail,
    "cut middle": cut_middle,
    "repeated piece": repeat,
    "spliced header": splice,
    "zeroed structure": empty,
    "extreme numbers": resize,
    "joined clips": join,
}


def overwrite(data: bytes, place: int, new: bytes) -> bytes:
    """``data`` with ``new`` at ``place``, no longer than it was."""
    return (data[:place] + new + data[place + len(new) :])[: len(data)]


def stretch(random: Random, data: bytes) -> tuple[int, int]:
    """Two places in ``data``, often close to each other."""
    start = random.randrange(len(data))
    length = random.choice((1, random.randrange(1, 64), random.randrange(1, len(data) + 1)))
    return start, min(start + length, len(data))


def find_structure(random: Random, data: bytes) -> tuple[int, int]:
    """Where a structure of one of the kinds in `MARKS` begins, and where its name ends; else any place."""
    name = random.choice([name for name in MARKS if name in data] or [b""])
    places = [found.start() for found in re.finditer(re.escape(name), data)] if name else range(len(data))
    place = random.choice(places)
    return place, place + len(name)
