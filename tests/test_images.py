"""Any encoded picture becomes upright RGB, or an error with a reason."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from jobs.world.shards import bomb
from owl_model.images import ImageError, open_image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert open_image(encoded(Image.new(mode, (9, 7)), kind)).mode == "RGB"


def test_sixteen_bits_are_scaled_not_clipped():
    grey = Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16))
    assert open_image(encoded(grey, "PNG")).getpixel((0, 0)) == (128, 128, 128)


def test_transparency_lies_over_white():
    assert open_image(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "PNG")).getpixel((1, 1)) == (255, 255, 255)


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(encoded(Image.new("RGB", (30, 10)), "JPEG", exif=exif)).size == (10, 30)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"not a picture", "image_corrupt"),
        (encoded(Image.effect_noise((90, 90), 60).convert("RGB"), "JPEG")[:900], "image_truncated"),
        (bomb(20_000), "image_bomb"),
    ],
)
def test_bad_pictures_are_named(data, reason):
    with pytest.raises(ImageError) as caught:
        open_image(data)
    assert caught.value.reason == reason
