"""Web-like raw shards to measure curation with: pictures of a real size, encoded as the web encodes them.

Log-normal long sides around 675 px (mean 0.45 megapixel and 56 KB), 4:2:0 mostly, 14 % progressive, and 2 % that are
bad: cut short, not a picture, too small, too long, or without a caption. Drawn from noise whose amplitudes fall with
frequency, somewhat faster than in photographs (1/f, Field 1987): so the files come out as large as those of the web.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines import storage
from pipelines.curation.export import add_file

TEXT = """the old man in a red coat with two small dogs on the street near a market by the river under morning light;
a bicycle and a green window table, mountain boat people standing in a bright field at summer, city house tree beach"""
WORDS = TEXT.split()
BASE = 1400


def photographs(count: int, generator: np.random.Generator) -> list[Image.Image]:
    """RGB pictures of BASE px a side with amplitudes of 1/f^1.57, and edges as of things in front of others."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(BASE), np.fft.rfftfreq(BASE), indexing="ij"))
    frequency[0, 0] = np.inf
    pictures = []
    for _ in range(count):
        layers = []
        for _ in range(3):
            phases = np.exp(2j * np.pi * generator.random(frequency.shape))
            field = np.fft.irfft2(phases / frequency**1.57, s=(BASE, BASE))
            layers.append(field / field.std())
        shared, second, edge = layers
        colour = np.stack([shared, 0.8 * shared + 0.3 * second, 0.7 * shared - 0.3 * second], axis=-1)
        colour = colour + 1.2 * (edge > 0.4)[..., None] * generator.normal(size=3)
        pictures.append(Image.fromarray(np.clip(colour * 45 + 120, 0, 255).astype(np.uint8)))
    return pictures


def encoded(base: list[Image.Image], generator: np.random.Generator) -> bytes:
    long = int(np.clip(generator.lognormal(np.log(675), 0.35), 260, BASE))
    short = int(long * generator.uniform(0.6, 1.0))
    picture = base[generator.integers(len(base))]
    zoom = generator.uniform(1.0, BASE / long)
    left, top = (int(generator.uniform(0, BASE - side * zoom)) for side in (long, short))
    box = (left, top, int(left + long * zoom), int(top + short * zoom))
    size = (long, short) if generator.random() < 0.6 else (short, long)
    if size[0] < size[1]:
        picture, box = picture.transpose(Image.Transpose.TRANSPOSE), (box[1], box[0], box[3], box[2])
    buffer = io.BytesIO()
    picture.resize(size, Image.Resampling.BILINEAR, box=box).save(
        buffer,
        "JPEG",
        quality=int(generator.integers(72, 92)),
        progressive=bool(generator.random() < 0.14),
        subsampling="4:4:4" if generator.random() < 0.08 else "4:2:0",
    )
    return buffer.getvalue()


def spoilt(data: bytes, caption: str, generator: np.random.Generator) -> tuple[bytes, str]:
    kind = generator.integers(5)
    if kind == 0:
        return data[: len(data) // 2], caption
    if kind == 1:
        return b"<html>404</html>", caption
    if kind == 2:
        return data, ""
    size = (90, 80) if kind == 3 else (900, 140)
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).resize(size).save(buffer, "JPEG")
    return buffer.getvalue(), caption


def write_set(folder: str, pictures: int, seed: int = 0, each: int = 250) -> list[str]:
    """Tars of ``each`` samples (NNNNNNNN.jpg, NNNNNNNN.txt) in ``folder``; returns their paths. What is there stays."""
    generator = np.random.default_rng(seed)
    base = photographs(12, generator)
    paths = []
    for first in range(0, pictures, each):
        path = Path(folder) / f"web-{first // each:05d}.tar"
        paths.append(str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for number in range(first, min(first + each, pictures)):
                data = encoded(base, generator)
                caption = " ".join(generator.choice(WORDS, size=generator.integers(4, 16)))
                if generator.random() < 0.02:
                    data, caption = spoilt(data, caption, generator)
                add_file(tar, f"{number:08d}.jpg", data)
                add_file(tar, f"{number:08d}.txt", caption.encode())
    return paths


def write_tiny(folder: str, shards: int, each: int = 2) -> None:
    """Tars of ``each`` pictures of 64 px, to see what a shard costs by itself. What is there stays."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(shards):
        path = Path(folder) / f"tiny-{number:06d}.tar"
        if path.exists():
            continue
        with storage.open_write(str(path)) as file, tarfile.open(fileobj=file, mode="w") as tar:
            for row in range(each):
                pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).resize((64, 64)).save(buffer, "JPEG", quality=60)
                caption = " ".join(generator.choice(WORDS, size=6))
                add_file(tar, f"{number:06d}{row}.jpg", buffer.getvalue())
                add_file(tar, f"{number:06d}{row}.txt", caption.encode())
