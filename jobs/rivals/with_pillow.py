"""The picture of every rival that leaves pictures to Pillow. Needs only Pillow, so that any environment has it."""

from __future__ import annotations

import io

from PIL import Image

SIDE, SMALLEST, LONGEST, FEWEST = 224, 128, 3.0, 3


def is_fit(image: Image.Image) -> bool:
    return min(image.size) >= SMALLEST and max(image.size) <= LONGEST * min(image.size)


def shrink(data: bytes, judge: bool = True) -> bytes | None:
    """A JPEG of 224 px on the shorter side, and not enlarged; None where it cannot be decoded or, if ``judge``, is too
    small or too long."""
    try:
        image = Image.open(io.BytesIO(data))
        if judge and not is_fit(image):
            return None
        image.draft("RGB", (2 * SIDE, 2 * SIDE))  # a JPEG is decoded at a fraction of its size, as those who know do
        picture = image.convert("RGB")
        scale = min(1.0, SIDE / min(picture.size))
        size = (round(picture.width * scale), round(picture.height * scale))
        buffer = io.BytesIO()
        picture.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    except OSError:
        return None
    return buffer.getvalue()
