"""Image bytes → pixels: the one preprocessing of training, evaluation and serving.

`open_image` turns any encoded picture into upright RGB, refusing what is too large *before* decoding it.
`OwlImageProcessor` squashes to a square (mPLUG-Owl keeps no aspect ratio), scales and normalises.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 25_000_000
"""The default cap on a picture's declared size; a decompression bomb is refused by its header."""


class ImageError(ValueError):
    """A picture cannot be used. ``reason`` is a short name that ledgers count by."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def open_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads the header alone: size and format are known, no pixel is decoded yet."""
    try:
        image = Image.open(io.BytesIO(data))
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


class OwlImageProcessor(BaseImageProcessor):
    """Picture → [3, S, S] float32, S = ``image_size``: squash (bicubic), 1/255, (x - mean) / std."""

    model_input_names = ["pixel_values"]

    def __init__(self, image_size: int = 224, image_mean=CLIP_MEAN, image_std=CLIP_STD, resample: int = 3, **kwargs):
        super().__init__(**kwargs)
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.resample = resample

    @classmethod
    def from_backbone(cls, settings: dict) -> OwlImageProcessor:
        """From the contents of a vision backbone's ``preprocessor_config.json``."""
        size = settings.get("crop_size") or settings["size"]
        if isinstance(size, dict):
            size = size.get("height") or size["shortest_edge"]
        return cls(size, settings["image_mean"], settings["image_std"], settings.get("resample", 3))

    def preprocess(self, images, return_tensors=None, **kwargs) -> BatchFeature:
        images = images if isinstance(images, (list, tuple)) else [images]
        return BatchFeature({"pixel_values": torch.stack([self.pixels(image) for image in images])})

    def __call__(self, images, **kwargs) -> BatchFeature:
        return self.preprocess(images, **kwargs)

    def pixels(self, image: Image.Image | bytes) -> torch.Tensor:
        """One picture (or its encoded bytes) → [3, S, S]."""
        image = open_image(image) if isinstance(image, bytes) else image.convert("RGB")
        if image.size != (self.image_size, self.image_size):
            image = image.resize((self.image_size, self.image_size), Image.Resampling(self.resample))
        scaled = np.asarray(image, dtype=np.float32) / 255.0
        normal = (scaled - np.float32(self.image_mean)) / np.float32(self.image_std)
        return torch.from_numpy(normal.transpose(2, 0, 1).copy())
