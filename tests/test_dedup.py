"""Duplicates found by keys against duplicates found by comparing everything with everything."""

from __future__ import annotations

import hashlib
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.curation import ledger
from pipelines.curation.dedup import remove_duplicates
from pipelines.curation.likeness import (
    REACH,
    Deduplication,
    alike_pictures,
    choices,
    jaccard,
    picture_key,
    plain,
)
from pipelines.records import LEDGER, SCORES, THUMBNAILS

Made = dict
TEXT = """a red dog runs over the wet street while two old men in grey coats look at the river and talk of rain in a
small town by an empty harbour where boats lie under snow"""
WORDS = TEXT.split()


def made_up(shards: int, rows: int, seed: int) -> list[list[Made]]:
    """Made-up pictures and captions, copies and near copies among them."""
    generator = np.random.default_rng(seed)
    made: list[Made] = []
    books = []
    for shard in range(shards):
        for row in range(rows):
            item: Made = {
                "key": f"{shard}-{row}",
                "row": row,
                "shard": shard,
                "phash": int(generator.integers(0, 2**63)) * 2 + int(generator.integers(2)),
                "thumbnail": generator.integers(0, 256, 768).astype(np.uint8),
                "sha256": hashlib.sha256(f"{seed} {shard} {row}".encode()).hexdigest(),
                "captions": [" ".join(generator.choice(WORDS, size=12))],
                "width": int(generator.integers(100, 110)),
                "height": 100,
                "embedding": generator.normal(size=16).astype(np.float16),
            }
            if made and generator.random() < 0.5:
                copy_some(item, made[generator.integers(len(made))], generator)
            made.append(item)
        books.append(made[-rows:])
    return books


def copy_some(item: Made, old: Made, generator: np.random.Generator) -> None:
    kind = generator.integers(5)
    if kind == 0:
        item |= {name: old[name] for name in ("sha256", "phash", "thumbnail")}
    elif kind == 1:  # a few bits and a few grey levels away: sometimes near enough
        item["phash"] = old["phash"]
        for bit in generator.integers(0, 64, size=generator.integers(0, 9)):
            item["phash"] ^= 1 << int(bit)
        shift = generator.integers(0, 40) + generator.integers(-12, 13, 768)
        item["thumbnail"] = np.clip(old["thumbnail"].astype(int) * 0.8 + shift, 0, 255).astype(np.uint8)
    elif kind == 2:
        item["captions"] = [old["captions"][0].upper() + "!"]
    elif kind == 3:
        words = old["captions"][0].split()
        words[generator.integers(len(words))] = "blue"
        item["captions"] = [" ".join(words)]
    else:
        item["embedding"] = (old["embedding"] + generator.normal(size=16) * 0.2).astype(np.float16)


def write_books(folder: str, books: list[list[Made]]) -> list[str]:
    """Ledgers, thumbnails, scores and markers as curation leaves them; each ledger has a row that never was stored."""
    names = [f"s{number}" for number in range(len(books))]
    for name, rows in zip(names, books, strict=True):
        entries = [{**row, "phash": f"{row['phash']:016x}", "verdict": "kept"} for row in rows]
        entries.insert(1, {"key": "dropped before", "reason": "image_small", "verdict": "dropped"})
        table = pa.Table.from_pylist([{n: e.get(n) for n in LEDGER.names} for e in entries], schema=LEDGER)
        ledger.write_ledger(folder, name, table)
        thumbnails = pa.table({"thumbnail": [row["thumbnail"].tobytes() for row in rows]}, schema=THUMBNAILS)
        storage.write_arrow(f"{folder}/thumbnails/{name}.arrow", thumbnails)
        scores = [{"row": row["row"], "embedding": row["embedding"]} for row in rows]
        with storage.open_write(f"{folder}/scores/{name}.parquet") as file:
            pq.write_table(pa.Table.from_pylist(scores, schema=SCORES), file)
        ledger.write_marker(folder, name, f"{name}.tar", [entry.get("reason") for entry in entries], len(rows), "")
    entries = [{"shard": name, "kept": len(rows)} for name, rows in zip(names, books, strict=True)]
    storage.write_json(f"{folder}/manifest.json", {"shards": entries})
    return names


def alike(one: Made, two: Made, settings: Deduplication) -> set[str]:
    """The reasons for which two are duplicates."""
    reasons = set()
    if one["sha256"] == two["sha256"]:
        reasons.add("duplicate_exact")
    bits = np.array([one["phash"], two["phash"]], dtype=np.uint64)
    keys = [picture_key({"phash": bits}, settings, number) for number in range(len(choices(settings.radius)))]
    meet = any(key[0] == key[1] for key in keys) and (one["phash"] ^ two["phash"]).bit_count() <= REACH
    if meet and alike_pictures(one["thumbnail"][None], two["thumbnail"][None], settings)[0]:
        reasons.add("duplicate_near")
    first, second = plain(one["captions"]), plain(two["captions"])
    if settings.captions != "keep" and first == second:
        reasons.add("duplicate_caption")
    if settings.captions == "near" and jaccard(first, second) >= settings.caption_likeness:
        reasons.add("duplicate_caption_near")
    if settings.semantic is not None:
        a, b = (item["embedding"].astype(np.float64) for item in (one, two))
        if a @ b / np.linalg.norm(a) / np.linalg.norm(b) >= settings.semantic:
            reasons.add("duplicate_semantic")
    return reasons


ORDER = ("duplicate_exact", "duplicate_near", "duplicate_caption", "duplicate_caption_near", "duplicate_semantic")


def by_comparing_all(books: list[list[Made]], settings: Deduplication) -> dict[str, tuple[str, str]]:
    """key → (reason, key of the one kept): every pair looked at."""
    made = [item for rows in books for item in rows]
    wish = (lambda item: -item["width"] * item["height"]) if settings.keep == "largest" else (lambda item: 0)
    made.sort(key=lambda item: (wish(item), item["shard"], item["row"]))
    found: dict[str, tuple] = {}
    for (better, one), (_, two) in combinations(enumerate(made), 2):
        for reason in alike(one, two, settings):
            rank = (ORDER.index(reason), better, reason, one["key"])
            found[two["key"]] = min(found.get(two["key"], rank), rank)
    return {key: (reason, kept) for key, (_, _, reason, kept) in found.items()}


def entered(folder: str, names: list[str]) -> dict[str, tuple[str, str]]:
    rows = [row for name in names for row in ledger.read_ledger(folder, name).to_pylist()]
    return {
        row["key"]: (row["reason"], row["detail"].removeprefix("kept instead: "))
        for row in rows
        if row["reason"] not in (None, "image_small")
    }


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"radius": 6, "detail": 40}, marks=pytest.mark.slow),
        {"keep": "largest"},
        {"captions": "exact"},
        {"captions": "near", "caption_likeness": 0.85},
        {"semantic": 0.9},
    ],
    ids=str,
)
def test_keys_find_what_comparing_all_finds(cluster, tmp_path, settings, parts):
    asked = Deduplication(**settings)
    books = made_up(shards=3, rows=40, seed=parts)
    names = write_books(str(tmp_path), books)
    wanted = by_comparing_all(books, asked)
    entries = remove_duplicates(str(tmp_path), names, parts * 1_000_000, asked)
    assert entered(str(tmp_path), names) == wanted
    assert {reason for reason, _ in wanted.values()} >= {"duplicate_exact", "duplicate_near"}
    assert sum(sum(entry["dropped"].values()) for entry in entries) == len(wanted) + len(names)
    for name in names:
        out = storage.read_parquet(f"{tmp_path}/selection/{name}.parquet").to_pylist()
        assert {row["key"]: row["reason"] for row in out}.items() <= {k: r for k, (r, _) in wanted.items()}.items()
    assert remove_duplicates(str(tmp_path), names, parts * 1_000_000, asked) == entries  # asked again, the same


def test_what_was_decided_is_taken_back_by_other_settings(cluster, tmp_path):
    books = made_up(shards=2, rows=50, seed=0)
    names = write_books(str(tmp_path), books)
    remove_duplicates(str(tmp_path), names, 100, Deduplication(captions="near"))
    remove_duplicates(str(tmp_path), names, 100, Deduplication())
    assert entered(str(tmp_path), names) == by_comparing_all(books, Deduplication())


def test_earlier_versions_and_benchmarks_come_first(cluster, tmp_path):
    books = made_up(shards=6, rows=40, seed=5)
    folders = [f"{tmp_path}/{name}" for name in ("benchmark", "earlier", "new")]
    names = [write_books(folder, books[2 * n : 2 * n + 2]) for n, folder in enumerate(folders)]
    settings = Deduplication(keep="largest", apart_from=[folders[0]], earlier=[folders[1]])
    remove_duplicates(folders[2], names[2], 80, settings)
    others = [(n // 2, item) for n, rows in enumerate(books[:4]) for item in rows]
    found = entered(folders[2], names[2])
    reasons = set()
    for item in (item for rows in books[4:] for item in rows):
        like = {where for where, other in others if alike(other, item, settings)}
        if like:
            reason, kept = found[item["key"]]
            assert reason == "contaminated" if like == {0} else reason in ("contaminated", *ORDER)
            assert " in " in kept
            reasons.add(reason)
    assert "contaminated" in reasons
    assert not entered(folders[0], names[0])
    assert not entered(folders[1], names[1])


def test_every_pair_within_the_radius_meets():
    generator = np.random.default_rng(1)
    settings = Deduplication()
    for _ in range(300):
        one = int(generator.integers(0, 2**63))
        two = one
        for bit in generator.choice(64, size=settings.radius, replace=False):
            two ^= 1 << int(bit)
        keys = [
            picture_key({"phash": np.array([one, two], dtype=np.uint64)}, settings, number)
            for number in range(len(choices(settings.radius)))
        ]
        assert any(key[0] == key[1] for key in keys)
