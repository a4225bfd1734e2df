"""Image bytes → pixels: the one preprocessing of training, evaluation and serving.

`open_image` turns any encoded picture into upright RGB, refusing what is too large *before* decoding it; `to_pixels`
makes it square (mPLUG-Owl keeps no aspect ratio), scales and normalises. Nothing here needs torch, so that
curation can decode with the same code in processes that never load it.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 25_000_000
"""The default cap on a picture's declared size; a decompression bomb is refused by its header."""


class ImageError(ValueError):
    """A picture cannot be used. ``reason`` is a short name that ledgers count by."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def open_header(data: bytes, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Reads the header alone: size and format are known, no pixel is decoded yet. ``formats`` are those tried."""
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise ImageError("image_bomb", str(error)) from None
    except Exception as error:  # Pillow raises a different class for each kind of damage
        raise ImageError("image_corrupt", type(error).__name__) from None
    if image.width * image.height > max_pixels:
        raise ImageError("image_bomb", f"declares {image.width}×{image.height}, above {max_pixels} pixels")
    return image


def decode(image: Image.Image) -> Image.Image:
    """Upright RGB; transparency over white. A file that ends early is an error, not a grey rest."""
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except Exception as error:
        message = str(error).lower()
        truncated = "truncated" in message or "unexpected end" in message or "incomplete" in message
        raise ImageError("image_truncated" if truncated else "image_corrupt", str(error)) from None
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode.startswith("I;16"):  # 16 bit: Pillow would clip, not scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Encoded bytes → upright RGB picture. Raises ImageError with the reason."""
    return decode(open_header(data, max_pixels))


def random_crop(image: Image.Image, least: float, random: np.random.Generator) -> Image.Image:
    """A rectangle of the picture's own shape, of ``least`` to all of its area, anywhere in it."""
    scale = random.uniform(least, 1.0) ** 0.5
    width, height = (max(1, round(side * scale)) for side in image.size)
    left, top = random.integers(image.width - width + 1), random.integers(image.height - height + 1)
    return image.crop((left, top, left + width, top + height))


def squash(image: Image.Image, side: int, resample: Image.Resampling, mean) -> Image.Image:
    """To the square in one step, its aspect ratio lost: mPLUG-Owl."""
    return image if image.size == (side, side) else image.resize((side, side), resample)


def squash_twice(image: Image.Image, side: int, resample: Image.Resampling, mean) -> Image.Image:
    """To a square of the longer side (always bicubic), then to size: mPLUG-Owl2's demo and evaluations."""
    longer = max(image.size)
    return squash(image.resize((longer, longer), Image.Resampling.BICUBIC), side, resample, mean)


def pad(image: Image.Image, side: int, resample: Image.Resampling, mean) -> Image.Image:
    """In the middle of a square of the mean colour: mPLUG-Owl2's fine-tuning scripts."""
    longer = max(image.size)
    square = Image.new("RGB", (longer, longer), tuple(int(value * 255) for value in mean))
    square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
    return squash(square, side, resample, mean)


def crop(image: Image.Image, side: int, resample: Image.Resampling, mean) -> Image.Image:
    """The shorter side to size, then the middle: CLIP's own, which loses the margins."""
    shorter = min(image.size)
    width, height = (int(side * length / shorter) for length in image.size)
    image = image.resize((width, height), resample)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


FITS = {"squash": squash, "squash_twice": squash_twice, "pad": pad, "crop": crop}
"""The ways to make a picture square, by name."""


def to_pixels(image: Image.Image, side: int, mean, std, resample: int, fit: str = "squash") -> np.ndarray:
    """RGB picture → [3, side, side] float32: made square, 1/255, (x - mean) / std."""
    image = FITS[fit](image, side, Image.Resampling(resample), mean)
    scaled = (np.arange(256) * (1 / 255)).astype(np.float32)  # of each value a byte has, rounded as transformers does
    centre, spread = (np.asarray(numbers, dtype=np.float32)[:, None] for numbers in (mean, std))
    values = (scaled - centre) / spread  # [3, 256]
    bytes_ = np.asarray(image)
    return np.stack([values[channel][bytes_[:, :, channel]] for channel in range(3)])


def spread_frames(total: int, wanted: int) -> list[int]:
    """Which of ``total`` frames of a video are looked at: the middles of ``wanted`` equal stretches, as in the
    release."""
    stretch = (total - 1) / wanted
    return [int(stretch / 2) + round(stretch * index) for index in range(wanted)]
