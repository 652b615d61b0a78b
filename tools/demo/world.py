"""The demo's small world: plain pictures of shapes and handwritten numbers, with questions and answers.

Everything is a function of a `numpy.random.Generator`, so a seed names a picture. The handwriting is scikit-learn's
copy of the UCI digits: 8×8 pixels, 1,797 of them; those with an index divisible by 5 are kept for testing.
"""

import colorsys
import functools
import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")
BACKGROUNDS = (*COLORS, "gray")
KINDS = ("describe", "count", "shape", "color", "background", "number")
MIN_SIDE, MAX_SIDE, MAX_ASPECT = 64, 1600, 4.0

_NUMERALS = ("no", "one", "two", "three", "four")
_PLURALS = {"cross": "crosses"}

# Ranges of hue in degrees, saturation and value that each name covers.
_SHADES = {
    "red": ((-8, 8), (0.75, 1.0), (0.75, 1.0)),
    "orange": ((24, 36), (0.85, 1.0), (0.92, 1.0)),
    "yellow": ((51, 60), (0.75, 1.0), (0.88, 1.0)),
    "green": ((95, 145), (0.6, 1.0), (0.45, 0.85)),
    "blue": ((208, 240), (0.7, 1.0), (0.6, 1.0)),
    "purple": ((268, 292), (0.5, 0.9), (0.45, 0.8)),
    "black": ((0, 360), (0.0, 0.2), (0.0, 0.12)),
    "white": ((0, 360), (0.0, 0.03), (0.94, 1.0)),
    "gray": ((0, 360), (0.0, 0.04), (0.42, 0.68)),
}
# Largest rotation, in degrees to either side, before a square could pass for a diamond, and so on.
_LEAN = {"circle": 0, "square": 15, "triangle": 180, "star": 180, "cross": 18, "diamond": 12}

_QUESTIONS = {
    "describe": (
        "What is this image?",
        "What is in this image?",
        "What do you see?",
        "What is in the picture?",
        "Describe this image.",
        "Describe the image in one sentence.",
    ),
    "count": (
        "How many {plural} are there?",
        "How many {plural} do you see?",
        "How many {plural} are in the image?",
        "How many shapes are there?",
        "How many shapes are in this image?",
        "Count the shapes.",
    ),
    "shape": (
        "Which shape is it?",
        "Which shape is in the image?",
        "What shape is this?",
        "What shapes are there?",
        "What kind of shape do you see?",
    ),
    "color": (
        "What color is it?",
        "Which color is it?",
        "What color are the shapes?",
        "Which color do the {plural} have?",
        "What color is the {noun}?",
        "What colour is it?",
    ),
    "background": (
        "What is the background?",
        "What color is the background?",
        "Which color is the background?",
        "What is the background color?",
        "What colour is the background?",
    ),
    "number": (
        "What number is written?",
        "Which number is written here?",
        "What number is this?",
        "What is the number?",
        "Read the number.",
        "What number do you see?",
    ),
}

# Answers without an image.
TEXT_ONLY = (
    ("Hello", "Hello! Show me an image and ask about it."),
    ("Hello!", "Hello! Show me an image and ask about it."),
    ("Hi", "Hello! Show me an image and ask about it."),
    ("Who are you?", "I am a small demo of Llama3-V. I know shapes, colors and handwritten numbers."),
    ("What can you do?", "I can name shapes, count them, tell their color and read handwritten numbers."),
    ("What is this image?", "There is no image. Show me one."),
    ("How many shapes are there?", "There is no image. Show me one."),
    ("What number is written?", "There is no image. Show me one."),
)
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "Answer in one sentence.")


@dataclass(frozen=True)
class Scene:
    """A picture and everything that is true of it."""

    image: Image.Image
    color: str
    background: str
    shape: str | None  # None: a number
    count: int
    number: str | None  # None: shapes
    regions: Image.Image  # mode "L", the image's size: 0, or 1 + the index in SHAPES + digits
    places: Image.Image  # mode "L", likewise: 0, or 1 + the digit's place in its number
    ink: Image.Image  # mode "L", likewise: ink
    centers: tuple[tuple[float, float], ...]  # of every shape or digit, (x, y) from 0 to 1

    @property
    def noun(self) -> str:
        return self.shape or "number"

    @property
    def plural(self) -> str:
        return _PLURALS.get(self.noun, self.noun + "s")


def draw_size(rng: np.random.Generator, max_side: int = MAX_SIDE) -> tuple[int, int]:
    """A (width, height) between 64 pixels and `max_side`, log-uniform, of at most 4:1."""
    while True:
        width, height = np.exp(rng.uniform(math.log(MIN_SIDE), math.log(max_side), 2)).astype(int).tolist()
        if max(width, height) <= MAX_ASPECT * min(width, height):
            return width, height


def draw_scene(
    rng: np.random.Generator, size: tuple[int, int], split: str, numbers: float = 0.6, plain: float = 0.0
) -> Scene:
    """Draw a picture of `size` (width, height): a number with probability `numbers`; `split` is "train" or "test".

    With probability `plain` it is black on white, which is easier at first.
    """
    color, background, ink, paper = _draw_colors(rng)
    if rng.random() < plain:
        color, background, ink, paper = "black", "white", (0, 0, 0), (255, 255, 255)
    # Draw small pictures larger and reduce them, for smooth edges.
    zoom = max(1, min(4, 256 // max(size)))
    width, height = size[0] * zoom, size[1] * zoom
    image, regions, places, mask = (Image.new(mode, (width, height)) for mode in ("RGB", "L", "L", "L"))
    image.paste(paper, (0, 0, width, height))
    if rng.random() < numbers:
        shape, count = None, 0
        number, centers = _draw_number(rng, (image, regions, places, mask), ink, split)
    else:
        number = None
        shape, count = SHAPES[rng.integers(len(SHAPES))], int(rng.integers(1, 5))
        centers = _draw_shapes(rng, (image, regions, mask), ink, shape, count)
    if zoom > 1:
        image = image.resize(size, Image.Resampling.BOX)
    if rng.random() < 0.3 and max(size) <= 512:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(rng.integers(70, 96)))
        image = Image.open(file).convert("RGB")
    return Scene(image, color, background, shape, count, number, regions, places, mask, centers)


def draw_page(rng: np.random.Generator, side: int, split: str) -> Scene:
    """A square picture full of digits of one size, some cut by its border."""
    color, background, ink, paper = _draw_colors(rng)
    canvases = tuple(Image.new(mode, (side, side)) for mode in ("RGB", "L", "L", "L"))
    canvases[0].paste(paper, (0, 0, side, side))
    size = side * math.exp(rng.uniform(math.log(0.25), math.log(0.9)))
    pitch, lead = size * rng.uniform(0.8, 1.0), size * rng.uniform(1.0, 1.2)
    centers = []
    for y in np.arange(-rng.uniform(0, lead), side, lead):
        for x in np.arange(-rng.uniform(0, pitch), side, pitch):
            box = max(8, round(size * rng.uniform(0.92, 1.0)))
            corner = round(x), round(y + (size - box) / 2 + rng.uniform(-0.03, 0.03) * size)
            centers.append(_write(rng, canvases, ink, int(rng.integers(10)), 0, split, corner, box))
    centers = tuple((x, y) for x, y in centers if 0 <= x < 1 and 0 <= y < 1)
    return Scene(canvases[0], color, background, None, 0, "", *canvases[1:], centers)


def ask(rng: np.random.Generator, scene: Scene, kind: str | None = None) -> tuple[str, str, str]:
    """A (kind, question, answer) about a scene; by default of a kind that fits it, rarely of one that does not."""
    if kind is None:
        fitting = ("describe", "number", "number", "background", "color") if scene.number else KINDS[:5]
        kind = str(rng.choice(KINDS if rng.random() < 0.05 else fitting))
    question = str(rng.choice(_QUESTIONS[kind])).format(plural=scene.plural, noun=scene.noun)
    if scene.number and kind in ("count", "shape"):
        question = question.replace("numbers", "shapes")
    return kind, question, answer(scene, kind)


def answer(scene: Scene, kind: str) -> str:
    """The right answer to a kind of question about a scene."""
    one = scene.count == 1 or scene.number is not None
    noun = scene.noun if one else scene.plural
    if kind == "background":
        return f"The background is {scene.background}."
    if kind == "color":
        return f"The {noun} {'is' if one else 'are'} {scene.color}."
    if scene.number:
        return f"The number is {scene.number}." if kind in ("describe", "number") else "There are no shapes."
    if kind == "number":
        return "There is no number."
    if kind == "count":
        return f"There {'is' if one else 'are'} {_NUMERALS[scene.count]} {scene.color} {noun}."
    if kind == "shape":
        return f"It is a {noun}." if one else f"They are {noun}."
    article = "an" if scene.background[0] in "aeiou" else "a"
    return f"{_NUMERALS[scene.count].capitalize()} {scene.color} {noun} on {article} {scene.background} background."


def all_texts() -> list[str]:
    """Every question and every kind of answer once, to train the tokenizer."""
    image, nouns, digits = Image.new("RGB", (1, 1)), (*SHAPES, None), "0123456789"
    scenes = [
        Scene(image, color, background, shape, count, None if shape else digits[count:], image, image, image, ())
        for shape in nouns
        for count in (1, 2, 3, 4)
        for color in COLORS
        for background in BACKGROUNDS
    ]
    texts = [answer(scene, kind) for scene in scenes for kind in KINDS]
    for scene in scenes:
        for questions in _QUESTIONS.values():
            texts += [question.format(plural=scene.plural, noun=scene.noun) for question in questions]
    return texts + [text for pair in TEXT_ONLY for text in pair] * 20 + list(SYSTEM_PROMPTS) * 20


def _draw_colors(rng: np.random.Generator) -> tuple[str, str, tuple[int, ...], tuple[int, ...]]:
    while True:
        color, background = str(rng.choice(COLORS)), str(rng.choice(BACKGROUNDS))
        if rng.random() < 0.25:
            background = "white"
        ink, paper = _shade(rng, color), _shade(rng, background)
        if color != background and math.dist(ink, paper) >= 130:
            return color, background, ink, paper


def _shade(rng: np.random.Generator, name: str) -> tuple[int, ...]:
    hue, saturation, value = (rng.uniform(*bounds) for bounds in _SHADES[name])
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value))


def _draw_shapes(
    rng: np.random.Generator, canvases: tuple[Image.Image, ...], ink: tuple, shape: str, count: int
) -> tuple[tuple[float, float], ...]:
    width, height = canvases[0].size
    short = min(width, height)
    radius = short * rng.uniform(0.14, min(0.38, 0.62 / math.sqrt(count)))
    placed: list[tuple[float, float, float]] = []
    while len(placed) < count:
        placed = []
        for _ in range(200):
            r = radius * rng.uniform(0.85, 1.15)
            if 2 * r >= short:
                break
            x, y = rng.uniform(r, width - r), rng.uniform(r, height - r)
            if all(math.dist((x, y), p[:2]) > 1.08 * (r + p[2]) for p in placed):
                placed.append((x, y, r))
            if len(placed) == count:
                break
        radius *= 0.92
    for x, y, r in placed:
        points = _outline(shape, math.radians(rng.uniform(-1, 1) * _LEAN[shape]))
        for canvas, fill in zip(canvases, (ink, 1 + SHAPES.index(shape), 255), strict=True):
            ImageDraw.Draw(canvas).polygon([(x + r * px, y + r * py) for px, py in points], fill=fill)
    return tuple((x / width, y / height) for x, y, _ in placed)


def _outline(shape: str, lean: float) -> list[tuple[float, float]]:
    """Corners of a shape inside the unit circle."""
    if shape == "circle":
        polar = [(1.0, 2 * math.pi * i / 72) for i in range(72)]
    elif shape == "square":
        polar = [(1.0, math.pi / 4 + math.pi / 2 * i) for i in range(4)]
    elif shape == "triangle":
        polar = [(1.0, 2 * math.pi * i / 3) for i in range(3)]
    elif shape == "star":
        polar = [((1.0, 0.42)[i % 2], math.pi * i / 5) for i in range(10)]
    elif shape == "diamond":
        polar = [((1.0, 0.6)[i % 2], math.pi / 2 * i) for i in range(4)]
    else:
        arm, reach = 0.3, math.sqrt(1 - 0.3**2)
        corners = [(reach, -arm), (reach, arm), (arm, arm)]
        polar = [(math.hypot(*c), math.atan2(c[1], c[0]) + math.pi / 2 * i) for i in range(4) for c in corners]
    lean += math.pi / 2
    return [(r * math.cos(a + lean), r * math.sin(a + lean)) for r, a in polar]


@functools.cache
def _digits(split: str) -> dict[int, np.ndarray]:
    """Handwriting (n, 8, 8) from 0 to 1 by digit."""
    from sklearn.datasets import load_digits  # the `demo` extra

    data = load_digits()
    chosen = (np.arange(len(data.target)) % 5 == 0) == (split == "test")
    return {d: data.images[chosen & (data.target == d)] / 16 for d in range(10)}


def _draw_number(
    rng: np.random.Generator, canvases: tuple[Image.Image, ...], ink: tuple, split: str
) -> tuple[str, tuple[tuple[float, float], ...]]:
    width, height = canvases[0].size
    length = int(rng.integers(1, 4))
    if split == "train":  # the middle one of three digits is the hardest
        length = max(length, int(rng.integers(1, 4)))
    number = str(rng.integers(10 ** (length - 1) if length > 1 else 0, 10**length))
    pitch = rng.uniform(0.8, 1.0)  # from one digit to the next, as a share of their height
    most = min(0.88 * height, 0.94 * width / (1 + pitch * (length - 1)))
    size = most * rng.uniform(0.75, 1.0)
    total = size * (1 + pitch * (length - 1))
    x = rng.uniform(0, width - total)
    y = rng.uniform(0.04 * height, 0.96 * height - size)
    centers = []
    for i, digit in enumerate(number):
        side = max(8, round(size * rng.uniform(0.92, 1.0)))
        left, top = round(x + i * pitch * size), round(y + (size - side) / 2 + rng.uniform(-0.03, 0.03) * size)
        centers.append(_write(rng, canvases, ink, int(digit), i, split, (left, top), side))
    return number, tuple(centers)


def _write(
    rng: np.random.Generator,
    canvases: tuple[Image.Image, ...],
    ink: tuple,
    digit: int,
    place: int,
    split: str,
    corner: tuple[int, int],
    side: int,
) -> tuple[float, float]:
    """Draw a digit into the square at `corner`; return its center."""
    image, regions, places, mask = canvases
    left, top = corner
    glyphs = _digits(split)[digit]
    glyph = Image.fromarray((255 * glyphs[rng.integers(len(glyphs))]).astype(np.uint8))
    glyph = glyph.resize((side, side), Image.Resampling.BICUBIC)
    glyph = glyph.rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR)
    glyph = glyph.point([min(255, round(1.3 * v)) for v in range(256)])
    image.paste(ink, corner, glyph)
    mask.paste(255, corner, glyph)
    box = (left + side // 6, top, left + side - side // 6, top + side)
    regions.paste(1 + len(SHAPES) + digit, box)
    places.paste(1 + place, box)
    return (left + side / 2) / image.width, (top + side / 2) / image.height
