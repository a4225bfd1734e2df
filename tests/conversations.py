"""Conversations with none to three pictures, and pictures that differ."""

from __future__ import annotations

import io

from PIL import Image

COLOURS = ["red", "blue", "green", "white", "black", "orange", "purple", "grey", "brown"]


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", (80, 80), colour)
    image.paste("yellow", (10, 10, 10 + len(colour) * 5, 40))
    image.save(buffer, "PNG")
    return buffer.getvalue()


def ask(*parts: str) -> list[dict]:
    kinds = ("image", "video")
    content = [{"type": part} if part in kinds else {"type": "text", "text": part} for part in parts]
    return [{"role": "user", "content": content}]


CONVERSATIONS = [
    (ask("what is the circle ?"), 0),
    (ask("image", "circle ?"), 1),
    (ask("image", "image", "red large square ?"), 2),
    (ask("image", "is the", "image", "large", "image", "at top-left ?"), 3),
    (ask("yes ? no ? two ? three ?"), 0),
    ([*ask("image", "square ?"), {"role": "assistant", "content": "yes"}, *ask("what color ?")], 1),
    ([*ask("image", "circle ?"), {"role": "assistant", "content": "no"}, *ask("image", "red ?")], 2),
    (ask("image", "image", "image", "three ?"), 3),
]


def shown() -> list[list[bytes]]:
    colours = iter(COLOURS * 2)
    return [[picture(next(colours)) for _ in range(count)] for _, count in CONVERSATIONS]
