"""Scenes of coloured shapes: what there is, how it moves, when it appears, vanishes or turns, what the camera does."""

from __future__ import annotations

from dataclasses import dataclass
from math import dist, inf

import numpy as np

__all__ = ["CAMERAS", "COLOURS", "DIRECTIONS", "SHAPES", "THEMES", "Scene", "Thing", "draw_scene", "held_out"]

COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 85, 235),
    "yellow": (235, 215, 50),
    "purple": (165, 60, 205),
    "white": (245, 245, 245),
}
"""Names and their sRGB values, which vary a little from thing to thing."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "arrow")

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Names and unit vectors in pictures, x to the right and y down."""

CAMERAS = ("static", "pans left", "pans right", "zooms in", "zooms out")

THEMES = {"motion": 0.3, "events": 0.3, "camera": 0.15, "counting": 0.1, "orientation": 0.12, "nothing": 0.03}
"""What a scene is about, and the share of such scenes."""

SIZES = ((96, 96), (128, 128), (120, 160), (144, 144), (128, 160), (160, 120))
RATES = (8, 10, 12, 15, 24, 30)
LENGTHS = (16, 41)
"""Frames of a clip, the last excluded."""
SPEEDS = {"fast": (0.5, 0.62), "slow": (0.18, 0.26)}
"""How far a thing gets in the whole clip, as a share of the picture."""

BORDER = 0.14
"""How far centres stay from the edges of the picture, and half of how far they start from each other."""


@dataclass(frozen=True)
class Thing:
    """One shape; lengths are shares of the picture's sides, times of the clip's duration.

    Args:
        colour: a key of ``COLOURS``.
        shape: of ``SHAPES``.
        start: x and y of its centre at the beginning.
        radius: of the circle around it, a share of the picture's height.
        tint: added to its colour's values.
        tilt: turn of the shape, radians.
        direction: which way it moves, a key of ``DIRECTIONS``, or None.
        speed: a key of ``SPEEDS``, None where it does not move.
        distance: how far it gets.
        appears: when; 0 for a thing that is there from the start.
        vanishes: when; infinite for one that is there to the end.
        points: which way an arrow points, at the start and at the end.
        turns: when it turns from one to the other.
    """

    colour: str
    shape: str
    start: tuple[float, float]
    radius: float
    tint: tuple[int, int, int]
    tilt: float = 0.0
    direction: str | None = None
    speed: str | None = None
    distance: float = 0.0
    appears: float = 0.0
    vanishes: float = inf
    points: tuple[str, str] = ("up", "up")
    turns: float = 0.5

    @property
    def name(self) -> str:
        """``red circle``."""
        return f"{self.colour} {self.shape}"

    def place(self, time: float) -> tuple[float, float]:
        """x and y of its centre."""
        step = DIRECTIONS[self.direction] if self.direction else (0, 0)
        return self.start[0] + step[0] * self.distance * time, self.start[1] + step[1] * self.distance * time

    def seen(self, time: float) -> bool:
        """Whether it is there."""
        return self.appears <= time < self.vanishes

    def pointing(self, time: float) -> str:
        """Which way an arrow points."""
        return self.points[time >= self.turns]


@dataclass(frozen=True)
class Scene:
    """All that makes a clip; things that come later are in front.

    Args:
        theme: a key of ``THEMES``.
        things: shapes, no two alike in colour and shape unless they are to be counted.
        camera: of ``CAMERAS``.
        travel: how far it pans, a share of the width, or by how much it zooms.
        size: height and width in pixels.
        rate: frames per second.
        frames: of the clip.
        codec: ``h264`` or ``vp9``.
        seed: of the background.
    """

    theme: str
    things: tuple[Thing, ...]
    camera: str
    travel: float
    size: tuple[int, int]
    rate: int
    frames: int
    codec: str
    seed: int

    def times(self) -> list[float]:
        """Of the frames, from 0 to 1."""
        return [frame / (self.frames - 1) for frame in range(self.frames)]

    def view(self, time: float) -> tuple[float, float, float]:
        """The camera: zoom, and x and y of the world's point in the middle of the picture, from its own middle."""
        match self.camera:
            case "pans left":
                return 1.0, self.travel * (0.5 - time), 0.0
            case "pans right":
                return 1.0, self.travel * (time - 0.5), 0.0
            case "zooms in":
                return 1 + self.travel * time, 0.0, 0.0
            case "zooms out":
                return 1 + self.travel * (1 - time), 0.0, 0.0
        return 1.0, 0.0, 0.0

    def on_screen(self, thing: Thing, time: float) -> tuple[float, float, float]:
        """x and y of a thing's centre in the picture and its radius there."""
        zoom, dx, dy = self.view(time)
        x, y = thing.place(time)
        return 0.5 + (x - 0.5 - dx) * zoom, 0.5 + (y - 0.5 - dy) * zoom, thing.radius * zoom


def held_out(colour: str, shape: str, direction: str) -> bool:
    """Whether nothing of that colour and shape moves that way in clips to train on: at most one way for each pair."""
    place = (list(COLOURS).index(colour), SHAPES.index(shape), list(DIRECTIONS).index(direction))
    return sum(place) % 5 == 0


def draw_scene(rng: np.random.Generator, training: bool, theme: str | None = None) -> Scene:
    """A random scene.

    Args:
        rng: all of the scene follows from it.
        training: whether to leave out what is `held_out`; otherwise half of the scenes with motion have some of it.
        theme: a key of ``THEMES``, default a random one.
    """
    theme = theme or str(rng.choice(list(THEMES), p=list(THEMES.values())))
    camera = str(rng.choice(CAMERAS)) if theme == "camera" else "static"
    travel = rng.uniform(0.25, 0.4) if camera.startswith("pans") else rng.uniform(0.35, 0.6)
    return Scene(
        theme=theme,
        things=things_of(rng, theme, training),
        camera=camera,
        travel=float(travel),
        size=SIZES[rng.integers(len(SIZES))],
        rate=RATES[rng.integers(len(RATES))],
        frames=int(rng.integers(*LENGTHS)),
        codec="vp9" if rng.random() < 0.25 else "h264",
        seed=int(rng.integers(2**31)),
    )


def things_of(rng: np.random.Generator, theme: str, training: bool) -> tuple[Thing, ...]:
    """The things of a scene."""
    match theme:
        case "nothing":
            return ()
        case "counting":
            return counted(rng, training)
        case "events":
            return with_events(rng)
        case "orientation":
            names = names_of(rng, int(rng.integers(1, 4)), arrows=int(rng.integers(1, 3)))
            return set_out(rng, names, 0.2, training)
        case "camera":
            names = names_of(rng, int(rng.integers(1, 4)))
            return tuple(thing(rng, name, place) for name, place in placed(rng, names, border=0.26))
    return set_out(rng, names_of(rng, int(rng.integers(1, 5))), 0.75, training)


def names_of(rng: np.random.Generator, count: int, arrows: int = 0) -> list[tuple[str, str]]:
    """Different pairs of colour and shape, the first ``arrows`` of them arrows."""
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    chosen = [pairs[place] for place in rng.permutation(len(pairs))]
    pointed = [pair for pair in chosen if pair[1] == "arrow"][:arrows]
    return (pointed + [pair for pair in chosen if pair not in pointed])[: max(count, arrows)]


def counted(rng: np.random.Generator, training: bool) -> tuple[Thing, ...]:
    """One to four things of one shape, and some of other shapes."""
    shape = str(rng.choice(SHAPES))
    count = int(rng.integers(1, 5))
    others = [name for name in names_of(rng, 8) if name[1] != shape][: int(rng.integers(0, 6 - count))]
    names = [(str(rng.choice(list(COLOURS))), shape) for _ in range(count)] + others
    return set_out(rng, names, 0.25, training)


def with_events(rng: np.random.Generator) -> tuple[Thing, ...]:
    """Two to four things that appear or vanish one after the other, and perhaps one that does neither."""
    count = int(rng.integers(2, 5))
    names = names_of(rng, count + int(rng.random() < 0.4))
    gap = 0.72 / count
    times = 0.18 + gap * (np.arange(count) + rng.uniform(0.15, 0.55, count))
    found = []
    order = rng.permutation(len(names))
    for place_of, (name, place) in zip(order, placed(rng, names), strict=True):
        event = {} if place_of >= count else {("appears", "vanishes")[rng.integers(2)]: float(times[place_of])}
        found.append(thing(rng, name, place, **event))
    return tuple(found)


def set_out(rng: np.random.Generator, names: list[tuple[str, str]], share: float, training: bool) -> tuple[Thing, ...]:
    """Things, some of which move; they pass in front of each other, but neither start nor end there."""
    while True:
        things = [moving(rng, name, place, share, training) for name, place in placed(rng, names)]
        pairs = [(one, other) for index, one in enumerate(things) for other in things[:index]]
        if all(dist(one.place(time), other.place(time)) > 0.2 for one, other in pairs for time in (0.0, 1.0)):
            return tuple(things)


def placed(
    rng: np.random.Generator, names: list[tuple[str, str]], border: float = BORDER
) -> list[tuple[tuple[str, str], tuple[float, float]]]:
    """Each name with the centre of its thing, no two of which are close to each other."""
    while True:
        centres = rng.uniform(border, 1 - border, (len(names), 2))
        apart = np.linalg.norm(centres[:, None] - centres[None], axis=-1) + 9 * np.eye(len(names))
        if apart.min(initial=9) > 0.27:
            return [(name, (float(x), float(y))) for name, (x, y) in zip(names, centres, strict=True)]


def moving(
    rng: np.random.Generator, name: tuple[str, str], place: tuple[float, float], share: float, training: bool
) -> Thing:
    """A thing that moves with the probability ``share``, somewhere it has room to."""
    if rng.random() >= share:
        return thing(rng, name, place)
    ways = [way for way in DIRECTIONS if not (training and held_out(*name, way))]
    if not training and rng.random() < 0.5:
        ways = [way for way in ways if held_out(*name, way)] or ways
    way, speed = str(rng.choice(ways)), str(rng.choice(list(SPEEDS)))
    distance = float(rng.uniform(*SPEEDS[speed]))
    room = 1 - 2 * BORDER - distance
    along = BORDER + float(rng.uniform(0, room)) + (distance if way in ("left", "up") else 0)
    start = (along, place[1]) if DIRECTIONS[way][0] else (place[0], along)
    return thing(rng, name, start, direction=way, speed=speed, distance=distance)


def thing(rng: np.random.Generator, name: tuple[str, str], place: tuple[float, float], **given: object) -> Thing:
    """A thing at rest unless more is ``given``; an arrow turns as often as not."""
    ways = list(DIRECTIONS)
    first = str(rng.choice(ways))
    last = str(rng.choice([way for way in ways if way != first])) if rng.random() < 0.6 else first
    return Thing(
        colour=name[0],
        shape=name[1],
        start=place,
        radius=float(rng.uniform(0.1, 0.135)),
        tint=tuple(int(value) for value in rng.integers(-18, 19, 3)),  # type: ignore[arg-type]
        tilt=float(rng.uniform(-0.2, 0.2)),
        points=(first, last),
        turns=float(rng.uniform(0.35, 0.65)),
        **given,  # type: ignore[arg-type]
    )
