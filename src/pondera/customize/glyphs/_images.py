"""Scenes of 16 by 16 pixels: one glyph of a font, in a colour, on a background, at a position; and their prompts."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from pondera.errors import BadInput, nearest

T = TypeVar("T")
SIDE = 16
GLYPHS = {  # what the prompt says: the character
    "star": "★",
    "heart": "♥",
    "diamond": "♦",
    "spade": "♠",
    "club": "♣",
    "plus": "✚",
    "arrow": "⬆",
    "disc": "●",
    "triangle": "▲",
    "square": "■",
    "check mark": "✔",
    "pawn": "♟",
    "rook": "♜",
    "flower": "✿",
    "letter A": "A",
    "letter H": "H",
    "letter K": "K",
    "letter T": "T",
    "letter U": "U",
    "digit 2": "2",
    "digit 4": "4",
    "digit 7": "7",
}
COLOURS = {
    "red": (225, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (255, 235, 40),
    "green": (30, 190, 50),
    "cyan": (40, 225, 235),
    "pink": (255, 120, 200),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
PAIRS = (  # the colourings in two tones that the base has seen: upper half, lower half
    ("red", "yellow"),
    ("yellow", "green"),
    ("green", "pink"),
    ("cyan", "orange"),
    ("pink", "cyan"),
    ("orange", "white"),
    ("white", "red"),
    ("black", "cyan"),
)
PLAIN = {
    "blue": (30, 60, 200),
    "purple": (110, 40, 150),
    "brown": (105, 65, 30),
    "gray": (130, 130, 130),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
PATTERNS = {  # two tones: bars two pixels high, squares four pixels wide
    "striped": ((70, 70, 70), (165, 165, 165)),
    "checkered": (
        (70, 50, 120),
        (180, 165, 215),
    ),
}
BACKGROUNDS = (*PLAIN, *PATTERNS)
POSITIONS = {"center": (1, 1), "top left": (0, 0), "top right": (0, 2), "bottom left": (2, 0), "bottom right": (2, 2)}
SIZES = (8, 9)


@dataclass(frozen=True)
class Concept:
    """A glyph that the base has never seen. tones: its two colours. split: "rows" (first tone above) or "columns"."""

    character: str
    tones: tuple[str, str]
    split: str


CONCEPTS = {
    "knight": Concept("♞", ("cyan", "red"), "rows"),
    "umbrella": Concept("☂", ("yellow", "pink"), "columns"),
    "flag": Concept("⚑", ("green", "orange"), "rows"),
    "omega": Concept("Ω", ("pink", "green"), "rows"),
    "psi": Concept("Ψ", ("orange", "cyan"), "columns"),
    "euro": Concept("€", ("red", "green"), "rows"),
    "hash": Concept("#", ("yellow", "red"), "columns"),
    "plane": Concept("✈", ("cyan", "yellow"), "columns"),
    "eject": Concept("⏏", ("pink", "yellow"), "rows"),
    "question": Concept("?", ("green", "cyan"), "columns"),
    "dollar": Concept("$", ("red", "cyan"), "rows"),
    "sigma": Concept("Σ", ("orange", "green"), "columns"),
    "section": Concept("§", ("red", "pink"), "rows"),
    "infinity": Concept("∞", ("cyan", "pink"), "columns"),
    "envelope": Concept("✉", ("yellow", "orange"), "rows"),
    "mars": Concept("♂", ("cyan", "green"), "columns"),
    "percent": Concept("%", ("pink", "orange"), "rows"),
    "hammers": Concept("⚒", ("green", "red"), "columns"),
    "pilcrow": Concept("¶", ("orange", "yellow"), "rows"),
    "yin yang": Concept("☯", ("orange", "red"), "columns"),
}


@dataclass(frozen=True)
class Scene:
    """What is on an image. colours: one name, or two for a glyph in two tones."""

    glyph: str
    colours: tuple[str, ...]
    background: str
    position: str


def prompt(
    glyph: str = "glyph",
    *,
    colours: tuple[str, ...] = (),
    background: str | None = None,
    position: str | None = None,
) -> str:
    """The words for a scene; what is left out is left open. The base was trained on these.

    >>> prompt("star", colours=("red",), background="blue", position="top left")
    'a red star on a blue background at the top left'
    >>> prompt("sks glyph", background="striped")
    'a sks glyph on a striped background'
    """
    words = f"{' and '.join(colours)} {glyph}" if colours else glyph
    words = f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    if background is not None:
        words += f" on a {background} background"
    return words if position is None else f"{words} at the {position}"


def draw(scene: Scene, *, generator: Generator | None = None) -> Float[Tensor, "3 16 16"]:
    """One image in [0, 1]. Size (8 or 9 pixels) and place (within a pixel) are drawn from `generator`, or are the
    middle ones without it."""
    concept = CONCEPTS.get(scene.glyph)
    if concept is None and scene.glyph not in GLYPHS:
        raise BadInput(f"draw got the unknown glyph {scene.glyph!r}{nearest(scene.glyph, (*GLYPHS, *CONCEPTS))}")
    character = concept.character if concept else GLYPHS[scene.glyph]
    size = SIZES[_below(len(SIZES), generator)] if generator else SIZES[0]
    cover = _cover(character, size)
    row, column = (_place(where, size, generator) for where in _known(scene.position, POSITIONS, "position"))
    ink = _ink(scene.colours, concept.split if concept else "rows", size)
    image = background(scene.background)
    under = image[:, row : row + size, column : column + size]
    image[:, row : row + size, column : column + size] = cover * ink + (1 - cover) * under
    return image


def background(name: str) -> Float[Tensor, "3 16 16"]:
    """A background without a glyph, in [0, 1]."""
    if name in PLAIN:
        return _rgb(PLAIN[name]).expand(3, SIDE, SIDE).clone()
    dark, light = (_rgb(tone) for tone in _known(name, PATTERNS, "background"))
    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    on = (row // 2) % 2 if name == "striped" else (row // 4 + column // 4) % 2
    return torch.where(on.bool(), light, dark)


def concept_image(
    name: str,
    background: str = "gray",
    position: str = "center",
    *,
    generator: Generator | None = None,
) -> Float[Tensor, "3 16 16"]:
    """A concept in its own two colours, in [0, 1]: the one image to customise on, or one for a judge.

    Args:
        name: one of `CONCEPTS`, which the base has never seen.
        background, position: one of `BACKGROUNDS` and one of `POSITIONS`.
        generator: draws size and place within a pixel; without it they are the middle ones.

    >>> concept_image("knight", "blue", "top left").shape
    torch.Size([3, 16, 16])
    """
    concept = _known(name, CONCEPTS, "concept")
    return draw(Scene(name, concept.tones, background, position), generator=generator)


def sample_scene(generator: Generator) -> Scene:
    """A scene of the training distribution: known glyphs only, a fifth of them in two tones, never white on white."""
    glyph = _pick(tuple(GLYPHS), generator)
    two = float(torch.rand((), generator=generator)) < 0.2
    colours = _pick(PAIRS, generator) if two else (_pick(tuple(COLOURS), generator),)
    ground = _pick(tuple(b for b in BACKGROUNDS if b not in colours), generator)
    return Scene(glyph, colours, ground, _pick(tuple(POSITIONS), generator))


def sample_prompt(scene: Scene, generator: Generator) -> str:
    """Words for `scene` with parts left out at random: the glyph's name ("glyph" instead) in 15%, each other in 25%."""
    plain, colour, ground, place = torch.rand(4, generator=generator).tolist()
    return prompt(
        "glyph" if plain < 0.15 else scene.glyph,
        colours=() if colour < 0.25 else scene.colours,
        background=None if ground < 0.25 else scene.background,
        position=None if place < 0.25 else scene.position,
    )


@cache
def _cover(character: str, size: int) -> Float[Tensor, "size size"]:
    """How much of each pixel the character covers, its longer side as long as `size`."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    font = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf")
    sheet = Image.new("L", (400, 400))
    ImageDraw.Draw(sheet).text((100, 100), character, fill=255, font=ImageFont.truetype(str(font), 180))
    left, top, right, bottom = sheet.getbbox()
    side, wide, high = max(right - left, bottom - top), right - left, bottom - top
    square = Image.new("L", (side, side))
    square.paste(sheet.crop((left, top, right, bottom)), ((side - wide) // 2, (side - high) // 2))
    small = square.resize((size, size), Image.Resampling.BOX)
    return torch.tensor(list(small.tobytes()), dtype=torch.float32).reshape(size, size) / 255


def _ink(colours: tuple[str, ...], split: str, size: int) -> Float[Tensor, "3 size size"]:
    if len(colours) not in (1, 2):
        raise BadInput(f"draw needs one or two colours, got {len(colours)}")
    first, last = (_rgb(_known(name, COLOURS, "colour")) for name in (colours[0], colours[-1]))
    upper = (torch.arange(size) < size / 2).reshape((-1, 1) if split == "rows" else (1, -1))
    return torch.where(upper, first, last).expand(3, size, size)


def _place(third: int, size: int, generator: Generator | None) -> int:
    """Where the glyph's square starts: within a pixel of the edge (0, 2) or of the middle (1)."""
    room = SIDE - size
    steps = {0: (0, 1), 1: tuple(range((room - 1) // 2, room // 2 + 2))[:3], 2: (room - 1, room)}[third]
    return steps[_below(len(steps), generator)] if generator else steps[len(steps) // 2]


def _rgb(colour: tuple[int, int, int]) -> Float[Tensor, "3 1 1"]:
    return torch.tensor(colour, dtype=torch.float32).reshape(3, 1, 1) / 255


def _known(name: str, table: dict[str, T], what: str) -> T:
    if name not in table:
        raise BadInput(f"no {what} {name!r}{nearest(name, table)}; there are {', '.join(table)}")
    return table[name]


def _pick(options: tuple[T, ...], generator: Generator) -> T:
    return options[_below(len(options), generator)]


def _below(n: int, generator: Generator | None) -> int:
    return int(torch.randint(n, (), generator=generator))
