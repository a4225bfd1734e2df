"""One raw sample → the verdict on it, its statistics and its stored form. Cheap checks come first.

captions → header (size, format, bombs) → pixels → hashes → stored bytes

JPEGs are decoded by libjpeg-turbo, at 1/2, 1/4 or 1/8 of their size where that leaves ``margin`` times the pixels
needed, and resized by torch's antialiased bicubic; everything else, and what libjpeg-turbo finds fault with, by Pillow.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import asdict
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image

from owl_model.chat import parts_of
from owl_model.images import ImageError, decode, open_header
from pipelines.curation.filters import (
    HeaderStats,
    Limits,
    is_blocked,
    judge_captions,
    judge_header,
    judge_pixels,
    masked,
    pixel_stats,
)
from pipelines.curation.sources import RawSample
from pipelines.records import THUMBNAIL, images_in
from pipelines.settings import Settings

HASHED_SIDE = 128
"""A picture that is kept as it is needs no more pixels than this on its shorter side, for its hashes."""
COSINES = np.cos(np.pi / 32 * (np.arange(32) + 0.5) * np.arange(8)[:, None]).astype(np.float32)  # the DCT's first rows
GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # of red, green and blue (ITU-R BT.601)
ORIENTATION = 0x0112


class Pictures(Settings):
    """What is stored of a picture."""

    short_side: int | None = None
    """Shorter side of stored pictures, in pixels; none is enlarged. None keeps the bytes as they are."""
    encoding: Literal["JPEG", "WEBP"] = "JPEG"
    """Format of pictures that were resized."""
    quality: int = 90
    """Quality of that format, 1 to 100."""
    margin: float = 4.0
    """A JPEG is decoded at a fraction of its size only if that leaves this many times the short side."""


def judge(sample: RawSample, limits: Limits, pictures: Pictures, marked: bool) -> dict:
    """A row with the columns of LEDGER, and of CURATED where ``reason`` is None: the sample is fit. ``marked`` asks
    for what takes the pixels: hash and thumbnail, by which near duplicates are found, entropy and sharpness."""
    row: dict = {"key": sample.key, "source": sample.source, "reason": sample.reason, "detail": sample.detail}
    row["captions"], row["url"] = sample.captions if sample.messages is None else None, sample.url
    if row["reason"] is None and is_blocked(sample.url, (), limits):
        row["reason"], row["detail"] = "blocked", sample.url
    if row["reason"] is None:
        row["reason"] = judge_words(sample, limits, row)
    if row["reason"] is None and sample.images:
        try:
            first = judge_image(sample.images[0], limits, pictures, marked, row)
            more = [judge_image(data, limits, pictures, False, {}) for data in sample.images[1:]]
            row["image"], row["more_images"] = first, more or None
        except ImageError as error:
            row["reason"], row["detail"] = error.reason, str(error)
    return row


def judge_words(sample: RawSample, limits: Limits, row: dict) -> str | None:
    """Judges the conversation or the captions, and keeps those captions that are fit."""
    if sample.messages is not None:
        return judge_messages(sample, row)
    captions = sample.captions or [""]
    stats, reasons = judge_captions(captions, limits)
    row |= asdict(stats[0])
    fit = [caption.strip() for caption, reason in zip(captions, reasons, strict=True) if reason is None]
    row["caption"] = [masked(caption) for caption in fit] if limits.contacts == "mask" else fit
    if not row["caption"]:
        row["detail"] = captions[0][:200]
        return reasons[0]
    return None if sample.images else "image_missing"


def judge_messages(sample: RawSample, row: dict) -> str | None:
    messages = sample.messages or []
    try:
        for message in messages:
            parts_of(message)
        spoken = images_in(messages)
        answered = messages[-1]["role"] == "assistant"
        row["messages"] = messages
    except (ValueError, KeyError, IndexError, TypeError) as error:
        row["detail"] = f"{type(error).__name__}: {error}"
        return "messages_malformed"
    if spoken != len(sample.images) or not answered:
        row["detail"] = f"{spoken} pictures spoken of, {len(sample.images)} given; ends with an answer: {answered}"
        return "messages_malformed"
    return None


def judge_image(data: bytes, limits: Limits, pictures: Pictures, marked: bool, row: dict) -> bytes:
    """Stored bytes of a fit picture; fills the picture's statistics in ``row``, its size as stored among them
    ("stored"). Raises ImageError otherwise."""
    row["bytes"], row["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    refuse_blocked(row, limits)
    header = open_header(data, limits.max_pixels)
    stats = HeaderStats(len(data), header.width, header.height, moves(header))
    row |= asdict(stats) | {"format": header.format}
    if reason := judge_header(stats, limits):
        raise ImageError(reason, f"{header.width}×{header.height}, {len(data)} bytes")
    wanted = pictures.short_side or HASHED_SIDE
    pixels = decode_jpeg(data, header, wanted * pictures.margin) if header.format == "JPEG" else None
    if pixels is None:
        pixels = np.array(decode(header))
    turned = (pixels.shape[0] > pixels.shape[1]) != (header.height > header.width)  # upright, as its EXIF tag asks
    row["stored"] = (header.height, header.width) if turned else header.size
    as_it_is = pictures.short_side is None or min(header.size) <= pictures.short_side
    if not as_it_is:
        pixels = shrink(pixels, *header.size, pictures.short_side or 0)
        row["stored"] = pixels.shape[1::-1]
    if marked or limits.min_entropy or limits.min_sharpness or limits.blocklists:
        image = Image.fromarray(pixels)
        row["phash"], row["thumbnail"], grey = fingerprints(image)
        refuse_blocked(row, limits)
        seen = pixel_stats(image, grey)
        row |= asdict(seen)
        if reason := judge_pixels(seen, limits):
            raise ImageError(reason, f"entropy {seen.entropy:.2f} bits, sharpness {seen.sharpness:.1f}")
    return data if as_it_is else encode(pixels, pictures)


def refuse_blocked(row: dict, limits: Limits) -> None:
    if is_blocked(None, (row["sha256"], row.get("phash")), limits):
        raise ImageError("blocked", f"sha256 {row['sha256']}, pHash {row.get('phash')}")


def moves(header: Image.Image) -> bool:
    """Whether it has several frames. Pillow looks for the second one, and raises what it likes where that is damaged;
    the first alone is used, so a damaged second one does not count."""
    try:
        return bool(getattr(header, "is_animated", False))
    except Exception:
        return False


def decode_jpeg(data: bytes, header: Image.Image, needed: float) -> np.ndarray | None:
    """[H, W, 3] upright pixels, their shorter side at least ``needed`` where the picture's own is. None where Pillow
    must look: another colour space than grey or YCbCr, or anything that libjpeg-turbo objects to."""
    if header.mode not in ("RGB", "L"):
        return None
    factor = next((f for f in (8, 4, 2) if min(header.size) / f >= needed), 1)
    smallest = (
        {"min_width": -(-header.width // factor), "min_height": -(-header.height // factor)} if factor > 1 else {}
    )
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", **smallest)
    except ValueError:
        return None
    turn = header.getexif().get(ORIENTATION, 1) if "exif" in header.info else 1
    return TURNS[turn](pixels) if turn in TURNS else pixels


TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
    8: np.rot90,
}
"""What an EXIF orientation asks for, as `PIL.ImageOps.exif_transpose` does it."""


def shrink(pixels: np.ndarray, width: int, height: int, short_side: int) -> np.ndarray:
    """[H, W, 3] → the size that a picture of ``width`` × ``height`` (before it was turned) has at ``short_side``."""
    import torch  # a second of every worker, which those that keep pictures as they are need not spend

    if (pixels.shape[0] > pixels.shape[1]) != (height > width):
        width, height = height, width
    scale = short_side / min(width, height)
    size = (round(height * scale), round(width * scale))
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    small = torch.nn.functional.interpolate(planes, size=size, mode="bicubic", antialias=True)
    return small[0].permute(1, 2, 0).contiguous().numpy()


def encode(pixels: np.ndarray, pictures: Pictures) -> bytes:
    if pictures.encoding == "JPEG":
        return simplejpeg.encode_jpeg(pixels, pictures.quality, "RGB", "420")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, pictures.encoding, quality=pictures.quality)
    return buffer.getvalue()


def fingerprints(image: Image.Image) -> tuple[str, bytes, np.ndarray]:
    """The two marks by which near duplicates are found, both read from one 32×32 copy: the 64-bit pHash as 16 hex
    digits, the signs of the 8×8 lowest frequencies in grey around their median (Zauner 2010, section 3.2.1), and a
    16×16 RGB thumbnail of 768 bytes, which tells a re-encoded picture from another of like shapes. Bilinear, because a
    box's hard edge moves with the picture's size: it made copies differ three times as much (docs/log.md). The grey
    copy comes third."""
    small = image.resize((32, 32), Image.Resampling.BILINEAR, reducing_gap=2.0)
    grey = np.asarray(small, dtype=np.float32) @ GREY
    low = (COSINES @ grey @ COSINES.T).flatten()
    bits = low > np.median(low[1:])
    thumbnail = small.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR).tobytes()
    return np.packbits(bits).tobytes().hex(), thumbnail, grey
