"""One raw sample → the verdict on it, its statistics and its stored form. Cheap checks come first.

captions → header (size, format, bombs) → pixels → hashes → stored bytes
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import asdict

import numpy as np
from PIL import Image

from owl_model.chat import parts_of
from owl_model.images import ImageError, decode, open_header
from pipelines.curation.filters import Limits, caption_stats, judge_caption, judge_size
from pipelines.curation.sources import RawSample
from pipelines.records import images_in

THUMBNAIL = 16
COSINES = np.cos(np.pi / 32 * (np.arange(32) + 0.5) * np.arange(8)[:, None]).astype(np.float32)  # the DCT's first rows


def judge(sample: RawSample, limits: Limits, short_side: int | None) -> dict:
    """A row with the columns of both CURATED and LEDGER: ``reason`` is None where the sample is fit."""
    row: dict = {"key": sample.key, "source": sample.source, "reason": sample.reason, "detail": sample.detail}
    if row["reason"] is None:
        row["reason"] = judge_words(sample, limits, row)
    if row["reason"] is None and sample.images:
        try:
            stored = [
                judge_image(data, limits, short_side, row if i == 0 else {}) for i, data in enumerate(sample.images)
            ]
            row["image"], row["more_images"] = stored[0], stored[1:] or None
        except ImageError as error:
            row["reason"], row["detail"] = error.reason, str(error)
    return row


def judge_words(sample: RawSample, limits: Limits, row: dict) -> str | None:
    """Judges the conversation or the captions, and keeps those captions that are fit."""
    if sample.messages is not None:
        return judge_messages(sample, row)
    captions = sample.captions or [""]
    stats = [caption_stats(caption) for caption in captions]
    row |= asdict(stats[0])
    reasons = [judge_caption(caption, stat, limits) for caption, stat in zip(captions, stats, strict=True)]
    row["caption"] = [caption.strip() for caption, reason in zip(captions, reasons, strict=True) if reason is None]
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


def judge_image(data: bytes, limits: Limits, short_side: int | None, row: dict) -> bytes:
    """Stored bytes of a fit picture; fills the picture's statistics in ``row``. Raises ImageError otherwise."""
    row["bytes"], row["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    header = open_header(data, limits.max_pixels)
    row["format"], row["width"], row["height"] = header.format, header.width, header.height
    if reason := judge_size(header.width, header.height, limits):
        raise ImageError(reason, f"{header.width}×{header.height}")
    image = decode(header)
    row["phash"], row["thumbnail"] = perceptual_hash(image), thumbnail(image)
    if short_side is None or min(image.size) <= short_side:
        row["width"], row["height"] = image.size
        return data
    scale = short_side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    row["width"], row["height"] = image.size
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def perceptual_hash(image: Image.Image) -> str:
    """64-bit pHash as 16 hex digits: the signs of the 8×8 lowest frequencies of a 32×32 grey picture, around their
    median (Zauner 2010, section 3.2.1). Bilinear, because a box's hard edge moves with the picture's size: it made
    copies differ three times as much (docs/log.md)."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float32)
    low = (COSINES @ grey @ COSINES.T).flatten()
    bits = low > np.median(low[1:])
    return np.packbits(bits).tobytes().hex()


def thumbnail(image: Image.Image) -> bytes:
    """16×16 RGB, 768 bytes: tells a re-encoded picture from another of like shapes."""
    return image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR).tobytes()
