"""When two samples are alike: what is looked at, by which keys candidates meet, and what decides.

Pictures   the 64-bit pHash, cut into ``radius`` + 2 pieces: where at most ``radius`` bits differ, two pieces are equal
           (the pigeonhole principle: Manku, Jain, Das Sarma 2007, section 3), so every pair of pieces is a key.
           16×16 thumbnails decide.
Captions   MinHash of their runs of five characters, in bands (Broder 1997; Leskovec, Rajaraman, Ullman, chapter 3).
           The Jaccard index of those runs decides.
Meaning    embeddings, met by the two nearest of a few centres (SemDeDup: Abbas et al. 2023, section 3). Their cosine
           decides.

All is plain numpy on columns of many rows; `dedup.py` brings together on Ray what shares a key.
"""

from __future__ import annotations

import binascii
import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.settings import OwlError, Settings

Columns = dict[str, np.ndarray]
"""Columns of equal length, [N, …] each."""

REACH = 12
"""Bits of the pHash beyond which no two pictures are compared: 400 photographs were never closer than 14."""
MOST_LIKE = 256
"""How many rows before it a row is compared with where they share a key; more do only where pictures are blank."""
BANDS, BAND_ROWS = 20, 6
"""Captions whose Jaccard index is 0.8 meet with a probability of 0.998, those of 0.4 with 0.08."""
RUN = 5
BLOCK = 2048
"""Embeddings multiplied at once."""


class Deduplication(Settings):
    radius: int = 4
    """Bits of the 64-bit pHash that may differ without a near duplicate being missed; up to 12 that meet by chance are
    looked at as well. 0 to 6; the cost grows as (radius + 2) (radius + 1) / 2."""
    difference: float = 0.25
    """Mean difference of two 16×16 thumbnails, in units of their standard deviation and brightness apart, up to which
    pictures count as the same. Others differ by 0.34 and more (docs/benchmarks.md)."""
    detail: int = 255
    """Largest difference of the thumbnails anywhere, in grey levels, likewise. For drawings, where a shape that moved a
    little makes another picture: 12."""
    captions: Literal["keep", "exact", "near"] = "keep"
    """Whether samples with an earlier one's captions are dropped: not at all, where the words are the same, or where
    they are nearly so."""
    caption_likeness: float = 0.8
    """Jaccard index of the captions' runs of five characters from which they are nearly the same."""
    semantic: float | None = None
    """Cosine of two pictures' embeddings from which they count as the same; needs `scoring.image_text`. None keeps
    them."""
    keep: Literal["first", "largest", "score"] = "first"
    """Which of those alike is kept: the first in order of (shard, row), the one with most pixels, or the one with the
    best image-text score; the first decides where these are equal."""
    earlier: list[str] = []
    """Curated datasets whose samples are kept before this one's."""
    apart_from: list[str] = []
    """Curated datasets, such as benchmarks, that nothing here may be like."""


class Matter(NamedTuple):
    """One respect in which samples can be alike."""

    columns: tuple[str, ...]
    """What is read of the ledger."""
    marks: Callable[[pa.Table], tuple[np.ndarray, Columns]]
    """Which rows of a ledger take part, [M] indices, and their marks. Where these have "same", rows in which it is
    equal are alike, and nothing more is asked."""
    rounds: Callable[[Deduplication], int]
    key: Callable[[Columns, Deduplication, int], np.ndarray]
    """[N] uint64 for one round. Rows of one key are compared."""
    pairs: Callable[[Columns, np.ndarray, Deduplication], Iterator[tuple[np.ndarray, np.ndarray]]]
    """Indices of rows that are alike or may be."""
    same: str
    """The reason for rows whose "same" is equal."""
    like: str
    """The reason for the others."""


# --- pictures --------------------------------------------------------------------------------------------------------


def picture_marks(table: pa.Table) -> tuple[np.ndarray, Columns]:
    rows = np.flatnonzero(table["phash"].is_valid())
    taken = table.take(rows)
    return rows, {"same": hex_numbers(taken["sha256"], 64), "phash": hex_numbers(taken["phash"], 16)}


def hex_numbers(texts: pa.ChunkedArray, digits: int) -> np.ndarray:
    """[N] uint64: the first 16 of each text's hexadecimal ``digits``."""
    data = binascii.unhexlify("".join(texts.to_pylist()))
    return np.frombuffer(data, dtype=">u8").reshape(-1, digits // 16)[:, 0].astype(np.uint64)


def choices(radius: int) -> list[tuple[int, int]]:
    return list(combinations(range(radius + 2), 2))


def picture_key(marks: Columns, settings: Deduplication, number: int) -> np.ndarray:
    edges = np.linspace(0, 64, settings.radius + 3).round().astype(int)
    key = np.zeros(len(marks["phash"]), dtype=np.uint64)
    for piece in choices(settings.radius)[number]:
        low, width = int(edges[piece]), int(edges[piece + 1] - edges[piece])
        key = key << np.uint64(width) | marks["phash"] >> np.uint64(low) & np.uint64((1 << width) - 1)
    return key


def picture_pairs(marks: Columns, key: np.ndarray, settings: Deduplication) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for first, second in neighbours(key):
        near = np.bitwise_count(marks["phash"][first] ^ marks["phash"][second]) <= REACH
        yield first[near], second[near]


def neighbours(key: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows that share a key, each with up to MOST_LIKE before it."""
    order = np.argsort(key, kind="stable")
    key = key[order]
    at = np.arange(len(key))
    for lag in range(1, MOST_LIKE + 1):
        at = at[at + lag < len(key)]
        at = at[key[at] == key[at + lag]]
        if not len(at):
            return
        yield order[at], order[at + lag]


def alike_pictures(first: np.ndarray, second: np.ndarray, settings: Deduplication) -> np.ndarray:
    """[N, 768] uint8 thumbnails, twice → [N] whether they show the same."""
    detail = np.abs(first.astype(np.int16) - second).max(axis=1) <= settings.detail
    return detail & (np.abs(levelled(first) - levelled(second)).mean(axis=1) <= settings.difference)


def levelled(thumbnails: np.ndarray) -> np.ndarray:
    """At mean 0 and deviation 1, so that a picture made brighter stays the same; nearly flat ones less so."""
    values = thumbnails.astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    return values / (values.std(axis=1, keepdims=True) + 4)


# --- captions --------------------------------------------------------------------------------------------------------


def plain(captions: list[str]) -> str:
    """The words of all captions in lower case, without marks between them."""
    text = unicodedata.normalize("NFKC", "\n".join(captions)).casefold()
    return " ".join(re.findall(r"\w+", text))


def runs(text: str) -> set[str]:
    return {text[start : start + RUN] for start in range(max(1, len(text) - RUN + 1))}


def caption_marks(table: pa.Table) -> tuple[np.ndarray, Columns]:
    rows, texts = caption_texts(table)
    return rows, {"same": digests(texts)}


def near_caption_marks(table: pa.Table) -> tuple[np.ndarray, Columns]:
    try:
        from rensa import RMinHash
    except ImportError:
        raise OwlError("deduplication.captions=near needs MinHash: pip install 'owl-vlm[captions]'") from None
    rows, texts = caption_texts(table)
    made = RMinHash.from_token_sets([list(runs(text)) for text in texts], BANDS * BAND_ROWS, 0)
    signature = np.array([one.digest() for one in made], dtype=np.uint64).reshape(len(texts), BANDS, BAND_ROWS)
    bands = np.zeros((len(texts), BANDS), dtype=np.uint64)
    for row in range(BAND_ROWS):
        bands = (bands ^ signature[:, :, row]) * np.uint64(0x9E3779B97F4A7C15)
    return rows, {"same": digests(texts), "bands": bands}


def caption_texts(table: pa.Table) -> tuple[np.ndarray, list[str]]:
    rows = np.flatnonzero(table["captions"].is_valid())
    return rows, [plain(captions) for captions in table["captions"].take(rows).to_pylist()]


def digests(texts: list[str]) -> np.ndarray:
    joined = b"".join(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest() for text in texts)
    return np.frombuffer(joined, dtype=np.uint64)


def caption_pairs(marks: Columns, key: np.ndarray, settings: Deduplication) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    yield from neighbours(key)


def no_pairs(marks: Columns, key: np.ndarray, settings: Deduplication) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    yield from ()


def jaccard(first: str, second: str) -> float:
    one, two = runs(first), runs(second)
    return len(one & two) / len(one | two)


# --- meaning ---------------------------------------------------------------------------------------------------------


def meaning_marks(table: pa.Table) -> tuple[np.ndarray, Columns]:
    """Embeddings of length 1."""
    rows = np.flatnonzero(table["embedding"].is_valid())
    values = table["embedding"].take(rows).combine_chunks()
    vectors = np.asarray(values.flatten(), dtype=np.float32).reshape(len(rows), -1) if len(rows) else np.zeros((0, 1))
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    return rows, {"vector": vectors.astype(np.float32)}


def centres(vectors: np.ndarray, count: int, turns: int = 10) -> np.ndarray:
    """[N, D] → [count, D]: spherical k-means, begun from rows spread evenly over the input."""
    found = vectors[np.linspace(0, len(vectors) - 1, count).astype(int)]
    for _ in range(turns):
        nearest = (vectors @ found.T).argmax(axis=1)
        sums = np.zeros_like(found)
        np.add.at(sums, nearest, vectors)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        found = np.where(lengths > 0, sums / np.maximum(lengths, 1e-9), found)
    return found


def nearest_centres(vectors: np.ndarray, found: np.ndarray) -> np.ndarray:
    """[N, D], [C, D] → [N, 2] indices of the nearest centres."""
    return np.argsort(-(vectors @ found.T), axis=1)[:, :2]


def meaning_key(marks: Columns, settings: Deduplication, number: int) -> np.ndarray:
    return marks["nearest"][:, min(number, marks["nearest"].shape[1] - 1)].astype(np.uint64)


def meaning_pairs(marks: Columns, key: np.ndarray, settings: Deduplication) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    order = np.argsort(key, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
        vectors = marks["vector"][group]
        for start in range(0, len(group), BLOCK):
            close = vectors[start : start + BLOCK] @ vectors.T >= (settings.semantic or 1.0)
            first, second = np.nonzero(close)
            later = second > first + start
            yield group[first[later] + start], group[second[later]]


MATTERS = {
    "pictures": Matter(
        ("sha256", "phash"),
        picture_marks,
        lambda settings: len(choices(settings.radius)),
        picture_key,
        picture_pairs,
        "duplicate_exact",
        "duplicate_near",
    ),
    "captions": Matter(
        ("captions",),
        caption_marks,
        lambda settings: 1,
        lambda marks, settings, number: marks["same"],
        no_pairs,
        "duplicate_caption",
        "duplicate_caption",
    ),
    "near captions": Matter(
        ("captions",),
        near_caption_marks,
        lambda settings: BANDS,
        lambda marks, settings, number: marks["bands"][:, number],
        caption_pairs,
        "duplicate_caption",
        "duplicate_caption_near",
    ),
    "meaning": Matter(
        ("embedding",),
        meaning_marks,
        lambda settings: 2,
        meaning_key,
        meaning_pairs,
        "duplicate_semantic",
        "duplicate_semantic",
    ),
}
REASONS = ("duplicate_exact", "duplicate_near", "duplicate_caption", "duplicate_caption_near", "duplicate_semantic")
"""In order of precedence, where a sample is like several."""


def asked_for(settings: Deduplication) -> list[str]:
    """Names of the matters that the settings ask for."""
    names = ["pictures"]
    if settings.captions != "keep":
        names.append("captions" if settings.captions == "exact" else "near captions")
    if settings.semantic is not None:
        names.append("meaning")
    return names


def preferences(table: pa.Table, keep: str) -> np.ndarray:
    """[N] int64: of rows alike, the one with the largest is kept."""
    if keep == "first":
        return np.zeros(len(table), dtype=np.int64)
    if keep == "largest":
        pixels = pc.multiply(table["width"].cast(pa.int64()), table["height"].cast(pa.int64()))
        return pc.fill_null(pixels, 0).to_numpy()
    score = pc.fill_null(table["image_text"], -1.0).to_numpy()
    return (score * 1e9).astype(np.int64)
