"""Duplicates found by keys against duplicates found by comparing everything with everything."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from pipelines.curation import ledger
from pipelines.curation.dedup import CHUNKS, Deduplication, choices_of, equal_chunks, find_duplicates, first_meeting

SETTINGS = Deduplication()


def books(folder, shards: int, rows: int) -> list[tuple[int, str, int, np.ndarray]]:
    """Ledgers of made-up pictures, copies and near copies among them: (order, sha256, phash, thumbnail) of each."""
    generator = np.random.default_rng(0)
    made: list[tuple[int, str, int, np.ndarray]] = []
    for shard in range(shards):
        entries = []
        for row in range(rows):
            phash = int(generator.integers(0, 2**63)) * 2 + int(generator.integers(2))
            thumbnail = generator.integers(0, 256, 768).astype(np.int64)
            sha = hashlib.sha256(f"{shard}-{row}".encode()).hexdigest()
            kind = generator.random()
            if made and kind < 0.4:
                _, old_sha, old_hash, old_thumbnail = made[generator.integers(len(made))]
                if kind < 0.1:
                    sha, phash, thumbnail = old_sha, old_hash, old_thumbnail
                else:  # a few bits and a few grey levels away: sometimes near enough
                    bits = generator.integers(0, 64, size=generator.integers(0, 9))
                    phash = old_hash
                    for bit in bits:
                        phash ^= 1 << int(bit)
                    thumbnail = np.clip(old_thumbnail + generator.integers(-3, 4, 768), 0, 255)
                    if kind > 0.35:
                        thumbnail[5] = (thumbnail[5] + 100) % 256
            made.append(((shard << 32) + row, sha, phash, thumbnail))
            entry = {"key": f"{shard}-{row}", "row": row, "sha256": sha, "phash": f"{phash:016x}"}
            entries.append({**entry, "thumbnail": thumbnail.astype(np.uint8).tobytes()})
        entries.append({"key": "dropped before", "row": None, "phash": None})
        table = ledger.pa.Table.from_pylist(
            [{name: entry.get(name) for name in ledger.LEDGER.names} for entry in entries], schema=ledger.LEDGER
        )
        ledger.write_ledger(str(folder), f"s{shard}", table)
    return made


def by_comparing_all(made, settings: Deduplication) -> dict[int, tuple[str, int]]:
    """order → (reason, order of the one kept): every pair looked at."""
    masks = [sum(1 << chunk for chunk in choice) for choice in choices_of(settings.radius)]
    found: dict[int, tuple[str, int]] = {}
    for index, (order, sha, phash, thumbnail) in enumerate(made):
        for other, other_sha, other_hash, other_thumbnail in made[:index]:
            different = phash ^ other_hash
            equal = sum(1 << c for c in range(CHUNKS) if not different >> 8 * c & 255)
            if not any(mask & equal == mask for mask in masks):
                continue
            apart = np.abs(thumbnail - other_thumbnail)
            near = apart.mean() <= settings.colour and apart.max() <= settings.detail
            if sha == other_sha or near:
                rank = ("duplicate_exact" if sha == other_sha else "duplicate_near", other)
                found[order] = min(found.get(order, rank), rank)
    return found


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("radius", [6, 4])
def test_keys_find_what_comparing_all_finds(cluster, tmp_path, radius, blocks):
    settings = Deduplication(radius=radius)
    made = books(tmp_path, shards=4, rows=60)
    found = find_duplicates(str(tmp_path), [f"s{n}" for n in range(4)], settings, blocks)
    got = {item["order"]: (item["reason"], item["kept_order"]) for items in found.values() for item in items}
    wanted = by_comparing_all(made, settings)
    assert got == wanted
    assert {"duplicate_exact", "duplicate_near"} == {reason for reason, _ in wanted.values()}
    for shard, items in found.items():
        for item in items:
            assert item["key"] == f"{shard[1:]}-{item['row']}"


def test_every_pair_within_the_radius_meets():
    generator = np.random.default_rng(1)
    first = first_meeting(SETTINGS.radius)
    for _ in range(300):
        different = 0
        for bit in generator.choice(64, size=SETTINGS.radius, replace=False):
            different |= 1 << int(bit)
        assert first[equal_chunks(np.array([different], dtype=np.uint64))[0]] >= 0
