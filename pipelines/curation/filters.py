"""What makes a sample unfit: small pure functions from statistics to a reason, or to None.

Captions are judged before a picture is opened, its header before its pixels. REASONS names everything that can be
written into a ledger.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from pipelines.settings import Settings

REASONS = {
    "shard_truncated": "the tar ends inside this sample",
    "json_malformed": "its JSON cannot be read",
    "messages_malformed": "its conversation has no answer, or not the pictures it speaks of",
    "image_missing": "a caption without a picture",
    "caption_empty": "no caption, or only white space",
    "caption_short": "fewer words than the recipe asks for",
    "caption_junk": "a file name, mostly symbols, or one word over and over",
    "image_corrupt": "the picture cannot be decoded",
    "image_truncated": "the picture's file ends early",
    "image_bomb": "the picture declares more pixels than allowed; it was not decoded",
    "image_small": "the shorter side is below the recipe's",
    "image_aspect": "the picture is too long or too tall",
    "duplicate_exact": "the same bytes as an earlier picture",
    "duplicate_near": "an earlier picture, encoded or sized anew",
}


class Limits(Settings):
    """Thresholds of the filters."""

    min_words: int = 2
    """Fewest words of a caption."""
    min_letters: float = 0.5
    """Smallest share of letters and spaces in a caption."""
    max_repetition: float = 0.6
    """Largest share of one word in a caption of five words or more."""
    min_side: int = 64
    """Shortest allowed side of a picture, in pixels."""
    max_aspect: float = 3.0
    """Largest ratio of the longer side to the shorter."""
    max_pixels: int = 25_000_000
    """Largest declared size, in pixels, that is decoded at all."""


FILE_NAME = re.compile(r"\S+\.(jpe?g|png|gif|webp|bmp|tiff?)", re.IGNORECASE)


@dataclass(frozen=True)
class CaptionStats:
    words: int
    letters: float
    """Share of letters and spaces."""
    repetition: float
    """Share of the commonest word."""


def caption_stats(caption: str) -> CaptionStats:
    words = caption.split()
    if not words:
        return CaptionStats(0, 0.0, 0.0)
    plain = sum(char.isalpha() or char.isspace() for char in caption)
    commonest = Counter(word.lower() for word in words).most_common(1)[0][1]
    return CaptionStats(len(words), plain / len(caption), commonest / len(words))


def judge_caption(caption: str, stats: CaptionStats, limits: Limits) -> str | None:
    """The reason to drop a caption, or None."""
    if not caption.strip():
        return "caption_empty"
    if FILE_NAME.fullmatch(caption.strip()) or stats.letters < limits.min_letters:
        return "caption_junk"
    if stats.words >= 5 and stats.repetition > limits.max_repetition:
        return "caption_junk"
    if stats.words < limits.min_words:
        return "caption_short"
    return None


def judge_size(width: int, height: int, limits: Limits) -> str | None:
    """The reason to drop a picture of this size, or None."""
    if min(width, height) < limits.min_side:
        return "image_small"
    if max(width, height) > limits.max_aspect * min(width, height):
        return "image_aspect"
    return None
