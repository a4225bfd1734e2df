"""Finds a benchmark's pictures and questions in a curated dataset, and leaves those samples out of what it selects.

A sample is the benchmark's where one of its pictures has the same bytes or looks the same (perceptual hash, decided by
thumbnails, as curation tells duplicates), or where its words hold a question of the benchmark: the whole of one that
has WORDS words at least, or a run of RUN words out of one. Shorter questions ("What is this?") are everybody's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray

from owl_model.images import decode, open_header
from pipelines import storage
from pipelines.curation import ledger
from pipelines.curation.curate import write_manifest
from pipelines.curation.decode import fingerprints
from pipelines.curation.likeness import REACH, Deduplication, alike_pictures, hex_numbers, plain
from pipelines.curation.options import Curation
from pipelines.curation.verdicts import parts_of
from pipelines.curation.versions import Lock, writing
from pipelines.evaluation.benchmarks import named
from pipelines.evaluation.benchmarks.base import Question
from pipelines.evaluation.evaluate import read_questions
from pipelines.progress import progress
from pipelines.records import THUMBNAIL
from pipelines.settings import OwlError

WORDS, RUN = 8, 13
REASON = "benchmark"
BLOCK = 1024
"""Rows whose hashes are held to all of the benchmark's at once."""


class Known(NamedTuple):
    """What is looked for."""

    name: str
    digests: frozenset[str]
    """sha256 of the pictures' files."""
    hashes: np.ndarray
    """[N] uint64 perceptual hashes."""
    thumbnails: np.ndarray
    """[N, 768] uint8."""
    questions: frozenset[str]
    """Whole questions, plain."""
    runs: frozenset[str]
    """Runs of words out of longer ones."""


def decontaminate(dataset: str, benchmark: str, data: str) -> dict[str, Any]:
    """Enters the verdict "benchmark" for what is found; returns the dataset's counts with "found": how many samples
    have a picture, how many a question, how many are left out in all. More benchmarks may follow; a rerun changes
    nothing.

    Raises OwlError for a dataset that is not finished, or a benchmark's missing file.
    """
    with writing(dataset) as lock:
        return leave_out(dataset, benchmark, data, lock)


def leave_out(dataset: str, benchmark: str, data: str, lock: Lock) -> dict[str, Any]:
    manifest = ledger.manifest_of(dataset)
    questions = read_questions(named(benchmark), data)
    known = known_of(benchmark, questions)
    shards = [entry["shard"] for entry in manifest["shards"]]
    with progress("decontaminate", len(shards), "shards") as counter:
        given = ray.put((dataset, shards, known))
        parts = ray.get([look_through.remote(given, part, counter) for part in parts_of(shards)])
    entries = [entry for some, _ in parts for entry in some]
    found = {kind: sum(counts[kind] for _, counts in parts) for kind in ("picture", "question", "samples")}
    kept = {name: manifest[name] for name in ("run", "set_aside", "withdrawn") if name in manifest}
    done = {**manifest.get("decontaminated", {}), named(benchmark).version.split("/")[0]: found}
    settings = Curation.model_validate(manifest["settings"])
    now = write_manifest(dataset, settings, entries, {**kept, "decontaminated": done}, "decontaminate", lock)
    return {**{name: now[name] for name in ("in", "kept", "dropped")}, "found": found}


def known_of(benchmark: str, questions: Sequence[Question]) -> Known:
    texts = [plain([spoken(question)]) for question in questions]
    pictures = {str(picture): picture for question in questions for picture in question.pictures}
    marks = ray.get([marks_of.remote(some) for some in cut(list(pictures.values()), 64)])
    rows = [row for some in marks for row in some]
    if not rows and not any(long_enough(text) for text in texts):
        raise OwlError(f"{benchmark} has neither pictures nor questions of {WORDS} words: there is nothing to look for")
    return Known(
        benchmark,
        frozenset(digest for digest, _, _ in rows),
        np.array([int(found, 16) for _, found, _ in rows], dtype=np.uint64),
        np.frombuffer(b"".join(small for _, _, small in rows), dtype=np.uint8).reshape(-1, 3 * THUMBNAIL**2),
        frozenset(text for text in texts if long_enough(text)),
        frozenset(run for text in texts for run in runs_of(text)),
    )


def spoken(question: Question) -> str:
    """The question itself where its facts have it, else the last words of the prompt."""
    if "question" in question.facts:
        return question.facts["question"]
    content = question.messages[-1]["content"]
    return content if isinstance(content, str) else " ".join(p["text"] for p in content if p["type"] == "text")


def long_enough(text: str) -> bool:
    return text.count(" ") >= WORDS - 1


def runs_of(text: str) -> Iterator[str]:
    words = text.split(" ")
    for start in range(len(words) - RUN + 1):
        yield " ".join(words[start : start + RUN])


def cut(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


@ray.remote(num_cpus=1)
def marks_of(pictures: list[str | bytes]) -> list[tuple[str, str, bytes]]:
    """sha256, perceptual hash and thumbnail of each picture."""
    return [marks(data if isinstance(data, bytes) else storage.read_bytes(data)) for data in pictures]


def marks(data: bytes) -> tuple[str, str, bytes]:
    found, thumbnail, _ = fingerprints(decode(open_header(data)))
    return hashlib.sha256(data).hexdigest(), found, thumbnail


@ray.remote(num_cpus=1, max_retries=-1)
def look_through(given: tuple[str, list[str], Known], part: tuple[int, int], counter) -> tuple[list[dict], dict]:
    """Decides on some shards; returns their entries of the books, and what was found."""
    dataset, shards, known = given
    entries, counts = [], dict.fromkeys(("picture", "question", "samples"), 0)
    for shard in shards[slice(*part)]:
        decided, found = look(dataset, shard, known)
        entries.append(ledger.decide(dataset, shard, decided, instead_of=()))
        counts = {kind: counts[kind] + found[kind] for kind in counts}
        counter.advance.remote(1)
    return entries, counts


def look(dataset: str, shard: str, known: Known) -> tuple[list[dict], dict[str, int]]:
    """Decisions on one shard's rows that are kept so far or were found before, and how many were found by what."""
    table = ledger.read_ledger(dataset, shard, ["row", "reason", "sha256", "phash"])
    rows = storage.open_arrow(f"{dataset}/shards/{shard}.arrow").read_all()
    places = [
        place
        for place, (row, reason) in enumerate(zip(table["row"].to_pylist(), table["reason"].to_pylist(), strict=True))
        if row is not None and reason in (None, REASON)
    ]
    stored = table["row"].take(places).to_pylist() if places else []
    shown = same_pictures(dataset, shard, table.take(places), rows, stored, known)
    asked = np.array([holds_question(rows, row, known) for row in stored], dtype=bool)
    decided = [
        {"place": place, "reason": REASON, "detail": f"{known.name}: {'a picture' if seen else 'a question'} of it"}
        for place, seen, said in zip(places, shown, asked, strict=True)
        if seen or said
    ]
    return decided, {"picture": int(shown.sum()), "question": int(asked.sum()), "samples": len(decided)}


def same_pictures(dataset: str, shard: str, table, rows, stored: list[int], known: Known) -> np.ndarray:
    """[N] whether a row shows a picture of the benchmark's. Second pictures, and those that curation did not hash, are
    hashed here."""
    found = np.zeros(len(stored), dtype=bool)
    if not len(known.hashes):
        return found
    hashed = np.flatnonzero(table["phash"].is_valid().to_numpy())
    if len(hashed):
        thumbnails = storage.open_arrow(f"{dataset}/thumbnails/{shard}.arrow").read_all()["thumbnail"]
        small = [thumbnails[stored[index]].as_py() for index in hashed]
        digests = [table["sha256"][int(index)].as_py() for index in hashed]
        found[hashed] = alike(digests, hex_numbers(table["phash"].take(hashed), 16), small, known)
    for index, row in enumerate(stored):
        first = [] if index in hashed or rows["image"][row].as_py() is None else [rows["image"][row].as_py()]
        others = [*first, *(rows["more_images"][row].as_py() or [])]
        if others and not found[index]:
            made = [marks(data) for data in others]
            hashes = np.array([int(value, 16) for _, value, _ in made], dtype=np.uint64)
            digests = [digest for digest, _, _ in made]
            if first:
                digests[0] = table["sha256"][index].as_py()  # of the file as it came, not as it is stored
            found[index] = alike(digests, hashes, [small for _, _, small in made], known).any()
    return found


def alike(digests: list[str], hashes: np.ndarray, thumbnails: list[bytes], known: Known) -> np.ndarray:
    """[N] whether pictures are among those known."""
    found = np.array([digest in known.digests for digest in digests], dtype=bool)
    small = np.frombuffer(b"".join(thumbnails), dtype=np.uint8).reshape(len(thumbnails), -1)
    for start in range(0, len(hashes), BLOCK):
        block = hashes[start : start + BLOCK]
        here, there = np.nonzero(np.bitwise_count(block[:, None] ^ known.hashes[None, :]) <= REACH)
        same = alike_pictures(small[here + start], known.thumbnails[there], Deduplication())
        found[here[same] + start] = True
    return found


def holds_question(rows, row: int, known: Known) -> bool:
    messages = rows["messages"][row].as_py() or []
    texts = [part["text"] for message in messages for part in message["content"] if part["text"]]
    texts += rows["caption"][row].as_py() or []
    pieces = [plain([piece]) for text in texts for piece in (text, *re.split(r"(?<=[.?!])\s+|\n", text))]
    return any(text in known.questions or not known.runs.isdisjoint(runs_of(text)) for text in pieces)
