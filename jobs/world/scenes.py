"""What is in a picture: up to three shapes on a 3×3 board, and sometimes a printed word."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
KINDS = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
CELLS = (
    "top-left",
    "top",
    "top-right",
    "left",
    "center",
    "right",
    "bottom-left",
    "bottom",
    "bottom-right",
)
WORDS = ("owl", "cat", "sun", "map", "key", "box", "cup", "hat")
HELD_OUT = frozenset(
    {
        ("large", "red", "star"),
        ("small", "green", "cross"),
        ("large", "blue", "triangle"),
        ("small", "yellow", "square"),
        ("large", "purple", "circle"),
        ("small", "black", "star"),
    }
)
"""Combinations that appear in no training picture and in no training text."""


@dataclass(frozen=True)
class Shape:
    size: str
    colour: str
    kind: str
    cell: int
    """Index into CELLS, row by row."""

    @property
    def row(self) -> int:
        return self.cell // 3

    @property
    def column(self) -> int:
        return self.cell % 3

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def held_out(self) -> bool:
        return (self.size, self.colour, self.kind) in HELD_OUT


@dataclass(frozen=True)
class Scene:
    shapes: tuple[Shape, ...]
    """In reading order; no two share a cell, a colour or a kind, so that each question has one answer."""
    word: str | None = None
    word_cell: int = 0

    @property
    def held_out(self) -> bool:
        return any(shape.held_out for shape in self.shapes)

    def having(self, **attributes: str) -> list[Shape]:
        """The shapes with all of the given attributes, for example ``having(colour="red")``."""
        return [s for s in self.shapes if all(getattr(s, name) == value for name, value in attributes.items())]


def draw_scene(random: Random, *, held_out: bool) -> Scene:
    """A random scene; with ``held_out`` it shows a held-out combination, otherwise none."""
    number = random.randint(1, 3)
    while True:
        sizes = random.choices(SIZES, k=number)
        looks = list(zip(sizes, random.sample(COLOURS, number), random.sample(KINDS, number), strict=True))
        if any(look in HELD_OUT for look in looks) == held_out:
            break
    cells = random.sample(range(len(CELLS)), number + 1)
    shapes = [Shape(*look, cell) for look, cell in zip(looks, cells, strict=False)]
    word = random.choice(WORDS) if random.random() < 0.3 else None
    return Scene(tuple(sorted(shapes, key=lambda shape: shape.cell)), word, cells[-1])
