"""The miniature's world: coloured shapes on flat backgrounds, their captions, and the drawing of both.

Every scene is drawn afresh from a random generator, so there is no data set to keep. A fixed eighth of all (shape,
colour, background) combinations is held out: training never sees them, the evaluation paints nothing else.
"""

from dataclasses import dataclass

import numpy as np

SIZE = 128  # pixels along each side of a picture

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.98, 0.53, 0.05),
    "yellow": (0.97, 0.88, 0.10),
    "green": (0.10, 0.62, 0.22),
    "blue": (0.12, 0.25, 0.85),
    "purple": (0.52, 0.14, 0.65),
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.05),
}
BACKGROUNDS = {
    "white": COLOURS["white"],
    "black": COLOURS["black"],
    "grey": (0.52, 0.52, 0.52),
    "red": COLOURS["red"],
    "yellow": COLOURS["yellow"],
    "green": COLOURS["green"],
    "blue": COLOURS["blue"],
    "pink": (0.98, 0.62, 0.76),
}
RADII = {"small": (17.0, 22.0), "": (22.0, 44.0), "large": (35.0, 44.0)}
POSITIONS = {
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "in the middle": (0, 0),
}
STYLES = ("plain", "outline", "pastel", "stripes", "frame")
FRAME_COLOUR = (0.80, 0.60, 0.15)


@dataclass(frozen=True)
class Thing:
    """One shape: its name, the name of its colour, and centre and radius in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One or two things on a background, and the caption that describes them."""

    things: tuple[Thing, ...]
    background: str
    caption: str


def is_held_out(shape: str, colour: str, background: str) -> bool:
    """Whether training never sees this combination."""
    code = SHAPES.index(shape) + 3 * list(COLOURS).index(colour) + 5 * list(BACKGROUNDS).index(background)
    return code % 8 == 0


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _pick(rng: np.random.Generator, names):
    names = list(names)
    return names[rng.integers(len(names))]


def _combination(rng: np.random.Generator, background: str, held_out: bool) -> tuple[str, str]:
    while True:
        shape, colour = _pick(rng, SHAPES), _pick(rng, COLOURS)
        if colour != background and is_held_out(shape, colour, background) == held_out:
            return shape, colour


def random_scene(rng: np.random.Generator, held_out: bool = False, pairs: float = 0.25) -> Scene:
    """A scene of one thing or, with probability `pairs`, of two: the first named stands on the left.

    Without a size word the radius is anything from medium to large, without a position the thing stands somewhere near
    the middle.
    """
    background = _pick(rng, BACKGROUNDS)
    if rng.random() < pairs:
        things = []
        for side in (-1, 1):
            shape, colour = _combination(rng, background, held_out)
            x, y = SIZE / 2 + side * rng.uniform(27, 33), SIZE / 2 + rng.uniform(-12, 12)
            things.append(Thing(shape, colour, x, y, rng.uniform(19, 26)))
        first, second = (_article(f"{thing.colour} {thing.shape}") for thing in things)
        return Scene(tuple(things), background, f"{first} and {second} on {_article(background)} background")
    shape, colour = _combination(rng, background, held_out)
    size = _pick(rng, ("", "", "small", "large"))
    radius = rng.uniform(*RADII[size])
    room = SIZE / 2 - 2 - radius
    position = _pick(rng, POSITIONS) if rng.random() < 0.5 else ""
    if position:
        offset = np.array(POSITIONS[position]) * min(30.0, room) + rng.uniform(-3, 3, 2)
    else:
        offset = rng.uniform(-1, 1, 2) * min(16.0, room)
    x, y = SIZE / 2 + np.clip(offset, -room, room)
    caption = f"{_article(f'{size} {colour} {shape}'.strip())} {position}".strip()
    return Scene((Thing(shape, colour, x, y, radius),), background, f"{caption} on {_article(background)} background")


def distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside) to a shape of radius 1 around the origin; `v` points down. Corners are not
    rounded, so the value is exact at the edges' flanks and a lower bound beyond corners."""
    if shape == "circle":
        return np.hypot(u, v) - 1
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.73) - 0.27
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.86
    if shape == "triangle":
        v = v - 0.3
        return np.maximum(v, 0.866 * np.abs(u) - 0.5 * v) - 0.6
    if shape == "cross":
        u, v = np.abs(u), np.abs(v)
        return np.minimum(np.maximum(u - 1, v - 0.33), np.maximum(v - 1, u - 0.33))
    if shape == "star":
        tip, notch, sector = 1.1, 0.46, np.pi / 5
        angle = np.abs((np.arctan2(u, -v) + sector) % (2 * sector) - sector)
        radius = np.hypot(u, v)
        edge = np.array([notch * np.cos(sector) - tip, notch * np.sin(sector)])
        normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
        return (radius * np.cos(angle) - tip) * normal[0] + radius * np.sin(angle) * normal[1]
    raise ValueError(f"{shape!r} is not a shape; the shapes are {', '.join(SHAPES)}")


def coverage(thing: Thing, style: str = "plain") -> np.ndarray:
    """How much of each pixel the thing covers: float64 [SIZE, SIZE] in 0..1, edges antialiased."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    inside = thing.radius * distance(thing.shape, (columns - thing.x) / thing.radius, (rows - thing.y) / thing.radius)
    if style == "outline":
        inside = np.abs(inside + 3) - 3
    covered = np.clip(0.5 - inside, 0, 1)
    if style == "stripes":
        # As wide as a latent and in step with it: finer ones would be a mixed colour there.
        covered = covered * np.clip(0.5 + 4 - np.abs((rows % 16) - 12), 0, 1)
    return covered


def paint(things, background, style: str = "plain") -> np.ndarray:
    """A picture, float32 [SIZE, SIZE, 3] in 0..1, of `(thing, rgb)` pairs on the colour `background`.

    Styles beside "plain" are what the LoRAs teach: "outline" keeps a line of 6 pixels, "pastel" mixes every colour with
    white, "stripes" keeps every second band of 8 pixels, "frame" adds a golden border of 8 pixels.
    """
    picture = np.broadcast_to(np.asarray(background, np.float32), (SIZE, SIZE, 3)).copy()
    for thing, colour in things:
        covered = coverage(thing, style)[..., None]
        picture = picture * (1 - covered) + np.asarray(colour) * covered
    if style == "pastel":
        picture = 0.4 * picture + 0.6
    if style == "frame":
        inner = picture[8:-8, 8:-8].copy()
        picture[:] = FRAME_COLOUR
        picture[8:-8, 8:-8] = inner
    return picture.astype(np.float32)


def draw(scene: Scene, style: str = "plain") -> np.ndarray:
    """The picture of a scene in its caption's colours; see `paint`."""
    return paint([(thing, COLOURS[thing.colour]) for thing in scene.things], BACKGROUNDS[scene.background], style)


def draw_any_colours(rng: np.random.Generator) -> np.ndarray:
    """A picture in random colours and style: what the autoencoder learns from, so that LoRAs' styles survive it."""
    scene = random_scene(rng)
    things = [(thing, rng.random(3)) for thing in scene.things]
    return paint(things, rng.random(3), _pick(rng, STYLES))
