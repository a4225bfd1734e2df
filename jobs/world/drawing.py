"""A scene → a picture, encoded as JPEG, PNG or WebP."""

from __future__ import annotations

import io
from math import cos, pi, sin
from random import Random

from PIL import Image, ImageDraw, ImageFont

from jobs.world.scenes import Scene, Shape

RGB = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 220),
    "yellow": (240, 200, 30),
    "purple": (150, 50, 170),
    "black": (25, 25, 25),
}
REACH = {"small": 0.22, "large": 0.42}
"""Half a shape's extent, as a share of its cell."""


def outline(kind: str, x: float, y: float, reach: float) -> list[tuple[float, float]]:
    """Corners of a shape around (x, y); a circle is a polygon of 40 corners."""
    if kind == "square":
        side = reach * 0.88
        return [(x - side, y - side), (x + side, y - side), (x + side, y + side), (x - side, y + side)]
    if kind == "triangle":
        return [(x, y - reach), (x + reach, y + reach * 0.85), (x - reach, y + reach * 0.85)]
    if kind == "cross":
        a, b = reach, reach * 0.32
        corners = [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b)]
        return [(x + dx, y + dy) for dx, dy in [*corners, (-b, -b)]]
    number = 40 if kind == "circle" else 10
    radii = (reach, reach) if kind == "circle" else (reach, reach * 0.42)
    turns = [(2 * pi * i / number - pi / 2, radii[i % 2]) for i in range(number)]
    return [(x + r * cos(angle), y + r * sin(angle)) for angle, r in turns]


def render(scene: Scene, random: Random) -> Image.Image:
    """Draws at twice the final size, 96 to 160 px a side, on a faintly tinted ground, with jitter."""
    width, height = random.randint(96, 160), random.randint(96, 160)
    ground = tuple(random.randint(205, 255) for _ in range(3))
    image = Image.new("RGB", (2 * width, 2 * height), ground)
    pen = ImageDraw.Draw(image)
    cell_w, cell_h = 2 * width / 3, 2 * height / 3

    def center(cell: int) -> tuple[float, float]:
        jitter_x, jitter_y = random.uniform(-0.06, 0.06), random.uniform(-0.06, 0.06)
        return (cell % 3 + 0.5 + jitter_x) * cell_w, (cell // 3 + 0.5 + jitter_y) * cell_h

    for shape in scene.shapes:
        draw_shape(pen, shape, center(shape.cell), min(cell_w, cell_h), random)
    if scene.word:
        font = ImageFont.load_default(size=min(cell_w, cell_h) * 0.5)
        pen.text(center(scene.word_cell), scene.word, fill=(60, 60, 60), font=font, anchor="mm", stroke_width=1)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def draw_shape(
    pen: ImageDraw.ImageDraw, shape: Shape, center: tuple[float, float], cell: float, random: Random
) -> None:
    reach = REACH[shape.size] * random.uniform(0.93, 1.07) * cell
    colour = tuple(min(255, max(0, value + random.randint(-14, 14))) for value in RGB[shape.colour])
    x, y = center
    pen.polygon(outline(shape.kind, x, y, reach), fill=colour)


def encode(image: Image.Image, extension: str, quality: int = 90) -> bytes:
    """Encoded bytes for the extension "jpg", "png" or "webp"."""
    buffer = io.BytesIO()
    options = {"png": {}, "webp": {"quality": quality, "method": 2}, "jpg": {"quality": quality, "subsampling": 0}}
    image.save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension], **options[extension])
    return buffer.getvalue()
