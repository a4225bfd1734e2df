"""What makes a sample unfit: small pure functions from a caption or a picture to statistics, and a table of rules from
statistics to a reason.

Captions are judged before a picture is opened, its header before its pixels, and the first rule that holds gives the
reason. REASONS names everything that can be written into a ledger. All statistics are kept there, so that a threshold
can be moved afterwards.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from pipelines import storage
from pipelines.settings import OwlError, Settings

REASONS = {
    "shard_truncated": "the tar ends inside this sample, or its header is damaged",
    "json_malformed": "its JSON cannot be read",
    "messages_malformed": "its conversation has no answer, or not the pictures it speaks of",
    "image_missing": "a caption without a picture",
    "caption_empty": "no caption, or only white space",
    "caption_junk": "a file name, mostly symbols, or one word over and over",
    "caption_short": "fewer words than the recipe asks for",
    "caption_long": "more words or characters than the recipe allows",
    "caption_capitals": "too many capital letters",
    "caption_non_words": "too many words that are none: codes, keys, runs without a vowel",
    "caption_contact": "a web or mail address, or a telephone number",
    "caption_boilerplate": "one of the recipe's stock phrases",
    "caption_language": "in another language than the recipe's",
    "image_corrupt": "the picture cannot be decoded",
    "image_truncated": "the picture's file ends early",
    "image_bomb": "the picture declares more pixels than allowed; it was not decoded",
    "image_light": "the picture's file is smaller than the recipe asks for",
    "image_small": "the shorter side is below the recipe's",
    "image_aspect": "the picture is too long or too tall",
    "image_animated": "the picture moves",
    "image_flat": "almost one colour",
    "image_blurred": "out of focus, or enlarged from something smaller",
    "blocked": "its web address, or its picture, stands on a blocklist",
    "score_image_text": "the caption does not tell of the picture, by the given CLIP",
    "score_aesthetic": "less pleasing than the recipe asks for, by the given head",
    "score_unsafe": "not safe, by the given classifier",
    "score_watermark": "a watermark, by the given classifier",
    "contaminated": "like a sample of a dataset that this one is kept apart from",
    "benchmark": "a picture or a question of an evaluation benchmark (owl eval --decontaminate)",
    "duplicate_exact": "the same bytes as another picture",
    "duplicate_near": "another picture, encoded, sized, lit or cut a little differently",
    "duplicate_caption": "the same words as another sample's",
    "duplicate_caption_near": "almost the same words as another sample's",
    "duplicate_semantic": "the same in meaning as another picture, by the given CLIP",
}


class Limits(Settings):
    """Thresholds of the filters."""

    min_words: int = 2
    """Fewest words of a caption."""
    max_words: int = 1000
    """Most words of a caption."""
    max_characters: int = 10_000
    """Most characters of a caption."""
    min_letters: float = 0.5
    """Smallest share of letters and spaces in a caption."""
    max_repetition: float = 0.6
    """Largest share of one word in a caption of five words or more."""
    max_capitals: float = 1.0
    """Largest share of capitals among the letters of a caption of three words or more."""
    max_non_words: float = 1.0
    """Largest share of words that are none (digits among letters, or four letters and more without a vowel)."""
    contacts: Literal["keep", "mask", "drop"] = "keep"
    """What becomes of web and mail addresses and telephone numbers in captions: kept, each replaced by its kind in
    brackets, or the caption dropped."""
    boilerplate: list[str] = []
    """Stock phrases; a caption that holds one, in whatever case, is dropped."""
    languages: list[str] = []
    """Languages to keep, as ISO 639-1 codes; empty keeps all. What is too short to tell counts as "un"."""
    min_side: int = 64
    """Shortest allowed side of a picture, in pixels."""
    max_aspect: float = 3.0
    """Largest ratio of the longer side to the shorter."""
    max_pixels: int = 25_000_000
    """Largest declared size, in pixels, that is decoded at all."""
    min_bytes: int = 0
    """Smallest file of a picture, in bytes."""
    animated: bool = True
    """Whether moving pictures are taken, by their first frame."""
    min_entropy: float = 0.0
    """Least entropy of the grey values, in bits (0 for one colour, 8 at most)."""
    min_sharpness: float = 0.0
    """Least variance of the Laplacian, as stored: below some tens, a photograph is blurred."""
    min_image_text: float | None = None
    """Least cosine of picture and best caption by `scoring.image_text`; CLIP's good pairs begin at 0.25 to 0.3."""
    min_aesthetic: float | None = None
    """Least score by `scoring.aesthetic`; LAION's heads give 1 to 10."""
    max_unsafe: float | None = None
    """Largest probability by `scoring.unsafe`."""
    max_watermark: float | None = None
    """Largest probability by `scoring.watermark`."""
    blocklists: list[str] = []
    """Text files with one item a line that nothing here may be: a domain (with all below it), or a picture's sha256 (64
    hexadecimal digits) or pHash (16)."""


# --- captions --------------------------------------------------------------------------------------------------------

FILE_NAME = re.compile(r"\S+\.(jpe?g|png|gif|webp|bmp|tiff?)", re.IGNORECASE)
CONTACTS = {
    "url": re.compile(
        r"(?:https?://|www\.)\S+|\b[\w-]+\.(?:com|org|net|info|biz|ru|de|co\.uk)\b(?:/\S*)?", re.IGNORECASE
    ),
    "e-mail": re.compile(r"\b[\w.+-]+@[\w-]+\.[\w.-]+\b"),
    "phone": re.compile(r"(?<![\w.])\+?\(?\d{2,4}\)?(?:[\s./-]?\d{2,4}){2,4}(?![\w.])"),
}
VOWEL = re.compile(r"[aeiouyàáâãäåæèéêëìíîïòóôõöøùúûüýαεηιουωаеёиоуыэюя]", re.IGNORECASE)


@dataclass(frozen=True)
class CaptionStats:
    words: int
    characters: int
    letters: float
    """Share of letters and spaces."""
    repetition: float
    """Share of the commonest word."""
    capitals: float
    """Share of capitals among the letters."""
    non_words: float
    """Share of words that are none."""
    contacts: str | None
    """The first kind of address or number in it."""
    language: str | None
    """ISO 639-1; None where the recipe does not ask."""


UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
"""Letters of scripts that put no blanks between words (Thai, Lao, Burmese, Khmer, kana, Han): each counts as a word."""


def caption_stats(caption: str, languages: bool = False) -> CaptionStats:
    words = (caption if caption.isascii() else UNSPACED.sub(r" \g<0> ", caption)).split()
    if not words:
        return CaptionStats(0, len(caption), 0.0, 0.0, 0.0, 0.0, None, None)
    letters = sum(map(str.isalpha, caption))
    capitals = sum(map(str.isupper, caption))
    commonest = Counter(map(str.lower, words)).most_common(1)[0][1]
    return CaptionStats(
        words=len(words),
        characters=len(caption),
        letters=(letters + sum(map(str.isspace, caption))) / len(caption),
        repetition=commonest / len(words),
        capitals=capitals / letters if letters else 0.0,
        non_words=sum(map(is_no_word, words)) / len(words),
        contacts=contact_in(caption),
        language=language_of(caption) if languages else None,
    )


def is_no_word(word: str) -> bool:
    """A code rather than a word. Letters of scripts without vowels of ours are left alone."""
    core = word.strip(".,;:!?\"'()[]")
    if core.isalpha():
        return len(core) > 3 and core.isascii() and not VOWEL.search(core)
    return len(core) > 3 and any(map(str.isdigit, core)) and any(map(str.isalpha, core))


def contact_in(caption: str) -> str | None:
    if "." not in caption and "@" not in caption and not any(map(str.isdigit, caption)):
        return None
    return next((kind for kind, pattern in CONTACTS.items() if pattern.search(caption)), None)


def masked(caption: str) -> str:
    """The caption with "[url]", "[e-mail]" or "[phone]" where one stood."""
    for kind in ("e-mail", "url", "phone"):
        caption = CONTACTS[kind].sub(f"[{kind}]", caption)
    return caption


@cache
def detector() -> Callable:
    try:
        import pycld2
    except ImportError:
        raise OwlError("limits.languages needs the language detector: pip install 'owl-vlm[languages]'") from None
    return pycld2.detect


def language_of(caption: str) -> str:
    """ISO 639-1 by CLD2, which needs no download; "un" where it cannot tell."""
    detect = detector()
    try:
        return detect(caption.replace("\x00", " "), bestEffort=True)[2][0][1].partition("-")[0]
    except Exception:  # CLD2's only error class: text that is no valid UTF-8
        return "un"


CaptionRule = Callable[[str, CaptionStats, Limits], bool]
CAPTION_RULES: tuple[tuple[str, CaptionRule], ...] = (
    ("caption_empty", lambda text, stats, limits: not text.strip()),
    ("caption_junk", lambda text, stats, limits: bool(FILE_NAME.fullmatch(text.strip()))),
    ("caption_junk", lambda text, stats, limits: stats.letters < limits.min_letters),
    ("caption_junk", lambda text, stats, limits: stats.words >= 5 and stats.repetition > limits.max_repetition),
    ("caption_short", lambda text, stats, limits: stats.words < limits.min_words),
    (
        "caption_long",
        lambda text, stats, limits: stats.words > limits.max_words or stats.characters > limits.max_characters,
    ),
    ("caption_capitals", lambda text, stats, limits: stats.words >= 3 and stats.capitals > limits.max_capitals),
    ("caption_non_words", lambda text, stats, limits: stats.non_words > limits.max_non_words),
    ("caption_contact", lambda text, stats, limits: limits.contacts == "drop" and stats.contacts is not None),
    (
        "caption_boilerplate",
        lambda text, stats, limits: any(phrase.lower() in text.lower() for phrase in limits.boilerplate),
    ),
    (
        "caption_language",
        lambda text, stats, limits: bool(limits.languages) and stats.language not in limits.languages,
    ),
)


def judge_caption(caption: str, stats: CaptionStats, limits: Limits) -> str | None:
    """The reason to drop a caption, or None."""
    return next((reason for reason, holds in CAPTION_RULES if holds(caption, stats, limits)), None)


def judge_captions(captions: list[str], limits: Limits) -> tuple[list[CaptionStats], list[str | None]]:
    """Statistics of each caption of a sample, and each one's reason to go; a sample without any has an empty one."""
    captions = captions or [""]
    stats = [caption_stats(caption, bool(limits.languages)) for caption in captions]
    return stats, [judge_caption(caption, stat, limits) for caption, stat in zip(captions, stats, strict=True)]


# --- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeaderStats:
    bytes: int
    width: int
    height: int
    animated: bool


@dataclass(frozen=True)
class PixelStats:
    entropy: float
    """Of the grey values of a 32×32 copy, in bits."""
    sharpness: float
    """Variance of the Laplacian of the grey picture as stored (Pech-Pacheco et al. 2000)."""


@dataclass(frozen=True)
class Scores:
    image_text: float | None = None
    aesthetic: float | None = None
    unsafe: float | None = None
    watermark: float | None = None


HeaderRule = Callable[[HeaderStats, Limits], bool]
HEADER_RULES: tuple[tuple[str, HeaderRule], ...] = (
    ("image_light", lambda stats, limits: stats.bytes < limits.min_bytes),
    ("image_small", lambda stats, limits: min(stats.width, stats.height) < limits.min_side),
    (
        "image_aspect",
        lambda stats, limits: max(stats.width, stats.height) > limits.max_aspect * min(stats.width, stats.height),
    ),
    ("image_animated", lambda stats, limits: stats.animated and not limits.animated),
)
PixelRule = Callable[[PixelStats, Limits], bool]
PIXEL_RULES: tuple[tuple[str, PixelRule], ...] = (
    ("image_flat", lambda stats, limits: stats.entropy < limits.min_entropy),
    ("image_blurred", lambda stats, limits: stats.sharpness < limits.min_sharpness),
)


SCORE_LIMITS = {
    "image_text": "min_image_text",
    "aesthetic": "min_aesthetic",
    "unsafe": "max_unsafe",
    "watermark": "max_watermark",
}
"""Each score's threshold."""
ScoreRule = Callable[[Scores, Limits], bool]
SCORE_RULES: tuple[tuple[str, ScoreRule], ...] = (
    ("score_image_text", lambda scores, limits: below(scores.image_text, limits.min_image_text)),
    ("score_aesthetic", lambda scores, limits: below(scores.aesthetic, limits.min_aesthetic)),
    ("score_unsafe", lambda scores, limits: below(limits.max_unsafe, scores.unsafe)),
    ("score_watermark", lambda scores, limits: below(limits.max_watermark, scores.watermark)),
)


def below(value: float | None, least: float | None) -> bool:
    """Whether both are there, and the first is smaller."""
    return value is not None and least is not None and value < least


def judge_header(stats: HeaderStats, limits: Limits) -> str | None:
    """The reason to drop a picture by its header alone, or None."""
    return next((reason for reason, holds in HEADER_RULES if holds(stats, limits)), None)


def judge_pixels(stats: PixelStats, limits: Limits) -> str | None:
    """The reason to drop a decoded picture, or None."""
    return next((reason for reason, holds in PIXEL_RULES if holds(stats, limits)), None)


def judge_scores(scores: Scores, limits: Limits) -> str | None:
    """The reason to drop a scored sample, or None."""
    return next((reason for reason, holds in SCORE_RULES if holds(scores, limits)), None)


def pixel_stats(image: Image.Image, small_grey: np.ndarray) -> PixelStats:
    """Of an RGB picture as it will be stored, and its 32×32 grey copy (values 0 to 255)."""
    counts = np.bincount(small_grey.astype(np.uint8).ravel())
    shares = counts[counts > 0] / small_grey.size
    grey = np.asarray(image.convert("L"), dtype=np.int16)
    laplacian = 4 * grey[1:-1, 1:-1]
    for around in (grey[:-2, 1:-1], grey[2:, 1:-1], grey[1:-1, :-2], grey[1:-1, 2:]):
        laplacian -= around
    flat = laplacian.ravel().astype(np.float32)
    variance = float(flat @ flat / flat.size - flat.mean() ** 2) if flat.size else 0.0
    return PixelStats(float(-(shares * np.log2(shares)).sum()), variance)


# --- blocklists ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def blocked_items(paths: tuple[str, ...]) -> frozenset[str]:
    """All lines of some blocklists. Raises OwlError for a line that is neither a domain nor a hash."""
    items: set[str] = set()
    for path in paths:
        with storage.open_read(path) as file:
            for line in file.read().decode().split():
                if not BLOCKABLE.fullmatch(line):
                    raise OwlError(f"blocklist {path} has {line!r}, which is neither a domain nor a sha256 nor a pHash")
                items.add(line.lower())
    return frozenset(items)


BLOCKABLE = re.compile(r"[0-9a-fA-F]{64}|[0-9a-fA-F]{16}|[\w-]+(\.[\w-]+)+")


def is_blocked(url: str | None, hashes: Iterable[str | None], limits: Limits) -> bool:
    """Whether a sample's address or one of its picture's hashes stands on a blocklist."""
    if not limits.blocklists:
        return False
    items = blocked_items(tuple(limits.blocklists))
    host = (urlsplit(url).hostname or "") if url else ""
    parts = host.split(".")
    return any(".".join(parts[first:]) in items for first in range(len(parts))) or any(h in items for h in hashes)
