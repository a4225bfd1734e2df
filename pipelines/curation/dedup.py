"""Duplicate pictures, found by moving keys and never pictures.

Two pictures are duplicates if their bytes are equal, or if their pHashes agree in 8 - ``radius`` of their eight bytes
and their 16×16 thumbnails differ by at most ``colour`` grey levels on average and ``detail`` anywhere. The one that
comes first stays: order is (shard, row), so the decision does not depend on how the work was spread.

The hash only finds candidates, by the pigeonhole principle (Manku, Jain, Das Sarma 2007, section 3): where at most
``radius`` bits differ, at least 8 - radius bytes are equal; so every choice of that many bytes becomes a key, and a
keyed exchange on Ray brings equal keys together. Each row is sent C(8, radius) times, 28 times at radius 6, at 28
bytes. Of rows that share a key, pairs are compared where they meet first, by thumbnails read from the ledgers.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import numpy as np
import pyarrow as pa
import ray
import ray.data

from pipelines.curation import ledger
from pipelines.curation.decode import THUMBNAIL
from pipelines.settings import Settings

CHUNKS = 8
MOST_LIKE = 256
"""How many earlier rows of one key a row is compared with; more share a key only where pictures are blank."""
AT_ONCE = 20_000
"""Pairs whose thumbnails are compared at once: 30 MB."""


class Deduplication(Settings):
    radius: int = 6
    """Bits of the 64-bit pHash that may differ between near duplicates without one being missed; 0 to 7."""
    colour: float = 2.5
    """Mean difference of the 16×16 thumbnails, in grey levels, up to which two pictures count as the same."""
    detail: int = 12
    """Largest difference of the thumbnails anywhere, likewise: a shape that moved a little is another picture."""


KEYED = pa.schema(
    [
        ("bucket", pa.int32()),  # which choice of bytes, and those bytes
        ("order", pa.int64()),  # rank of (shard, row): the smaller one stays
        ("phash", pa.uint64()),
        ("sha", pa.uint64()),  # the first 64 bits of sha256
    ]
)
FOUND = pa.schema(
    [
        ("order", pa.int64()),
        ("key", pa.string()),
        ("reason", pa.string()),
        ("kept_order", pa.int64()),
        ("kept_instead", pa.string()),
    ]
)
ROW_BITS = 32


def find_duplicates(output: str, shards: list[str], settings: Deduplication, blocks: int) -> dict[str, list[dict]]:
    """Shard id → its duplicate rows. ``blocks`` is how many parts the keys are exchanged into.

    Only the duplicates themselves come back, never the keys.
    """
    work = [{"output": output, "shard": shard, "rank": rank} for rank, shard in enumerate(shards)]
    keyed = ray.data.from_items(work, override_num_blocks=min(len(work), 4 * blocks)).map_batches(
        keyed_rows, batch_format="pyarrow", fn_kwargs={"radius": settings.radius}
    )
    given = {"output": output, "shards": ray.put(shards), "settings": settings.model_dump()}
    found = keyed.repartition(blocks, keys=["bucket"]).map_batches(
        duplicates_within, batch_size=None, batch_format="pyarrow", fn_kwargs=given
    )
    best: dict[int, dict] = {}
    for item in found.iter_rows():
        # Exact before near, then the earliest: a picture may be like several.
        if (before := best.get(item["order"])) is None or rank_of(item) < rank_of(before):
            best[item["order"]] = item
    by_shard: dict[str, list[dict]] = {shard: [] for shard in shards}
    for order, item in best.items():
        by_shard[shards[order >> ROW_BITS]].append({**item, "row": order & (2**ROW_BITS - 1)})
    return by_shard


def rank_of(item: dict) -> tuple[str, int]:
    return item["reason"], item["kept_order"]


def choices_of(radius: int) -> list[tuple[int, ...]]:
    return list(combinations(range(CHUNKS), CHUNKS - radius))


def keyed_rows(work: pa.Table, radius: int) -> pa.Table:
    """The pictures of some shards, once for each of their keys."""
    tables = []
    for item in work.to_pylist():
        table = ledger.read_ledger(item["output"], item["shard"], ["row", "sha256", "phash"])
        table = table.filter(pa.compute.and_(table["row"].is_valid(), table["phash"].is_valid()))
        if not len(table):
            continue
        hashes = np.array([int(value, 16) for value in table["phash"].to_pylist()], dtype=np.uint64)
        sha = np.array([int(value[:16], 16) for value in table["sha256"].to_pylist()], dtype=np.uint64)
        order = (item["rank"] << ROW_BITS) + table["row"].to_numpy().astype(np.int64)
        for number, choice in enumerate(choices_of(radius)):
            bucket = keys_of(hashes, choice, number)
            tables.append(pa.table({"bucket": bucket, "order": order, "phash": hashes, "sha": sha}, schema=KEYED))
    return pa.concat_tables(tables) if tables else KEYED.empty_table()


def keys_of(hashes: np.ndarray, choice: tuple[int, ...], number: int) -> np.ndarray:
    """[N] int32: the chosen bytes, mixed with the choice's number. Different bytes may share one; the pairs tell."""
    mixed = np.full(len(hashes), number + 1, dtype=np.uint64)
    for chunk in choice:
        byte = hashes >> np.uint64(8 * chunk) & np.uint64(255)
        mixed = (mixed * np.uint64(257) + byte) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(33)).astype(np.int32)


def duplicates_within(table: pa.Table, output: str, shards: ray.ObjectRef, settings: dict) -> pa.Table:
    """Duplicates among rows that share a bucket: sorted, every row is compared with those before it, lag by lag."""
    if "bucket" not in table.column_names or not len(table):
        return FOUND.empty_table()
    table = table.sort_by([("bucket", "ascending"), ("order", "ascending")]).combine_chunks()
    bucket, order, phash, sha = (table[name].to_numpy() for name in KEYED.names)
    likeness = Likeness(output, ray.get(shards) if isinstance(shards, ray.ObjectRef) else shards, settings)
    first = first_meeting(settings["radius"])
    number = meeting_numbers(bucket, phash, settings["radius"])
    best: dict[int, tuple[str, int]] = {}
    for lag in range(1, MOST_LIKE + 1):
        later = np.nonzero(bucket[lag:] == bucket[:-lag])[0] + lag
        if not len(later):
            break
        earlier = later - lag
        meets = first[equal_chunks(phash[later] ^ phash[earlier])] == number[later]
        meets &= order[later] > order[earlier]  # where two choices share a key, a row is there twice
        later, earlier = later[meets], earlier[meets]
        same = sha[later] == sha[earlier]
        like = same.copy()
        like[~same] = likeness(order[later[~same]], order[earlier[~same]])
        for row, other, exact in zip(order[later[like]], order[earlier[like]], same[like], strict=True):
            rank = ("duplicate_exact" if exact else "duplicate_near", int(other))
            if int(row) not in best or rank < best[int(row)]:
                best[int(row)] = rank
    rows = list(best)
    return pa.table(
        {
            "order": rows,
            "key": [likeness.key(row) for row in rows],
            "reason": [best[row][0] for row in rows],
            "kept_order": [best[row][1] for row in rows],
            "kept_instead": [likeness.key(best[row][1]) for row in rows],
        },
        schema=FOUND,
    )


def equal_chunks(different: np.ndarray) -> np.ndarray:
    """[N] XORs of two hashes → [N] bit masks of the bytes in which they agree."""
    mask = np.zeros(len(different), dtype=np.int64)
    for chunk in range(CHUNKS):
        mask |= ((different >> np.uint64(8 * chunk) & np.uint64(255)) == 0).astype(np.int64) << chunk
    return mask


def first_meeting(radius: int) -> np.ndarray:
    """[256]: for a mask of equal bytes, the first choice whose bytes are all among them; -1 for none."""
    masks = [sum(1 << chunk for chunk in choice) for choice in choices_of(radius)]
    return np.array([next((n for n, m in enumerate(masks) if m & mask == m), -1) for mask in range(256)])


def meeting_numbers(bucket: np.ndarray, phash: np.ndarray, radius: int) -> np.ndarray:
    """[N]: the number of the choice by which each row was sent here; -1 never occurs."""
    number = np.full(len(bucket), -2)
    for index, choice in enumerate(choices_of(radius)):
        number[(number == -2) & (keys_of(phash, choice, index) == bucket)] = index
    return number


class Likeness:
    """Compares pictures by their thumbnails, which it reads from the ledgers of the shards concerned."""

    def __init__(self, output: str, shards: list[str], settings: dict):
        self.settings = settings

        @lru_cache(maxsize=512)
        def read(rank: int) -> tuple[np.ndarray, list[str]]:
            table = ledger.read_ledger(output, shards[rank], ["row", "key", "thumbnail"])
            table = table.filter(table["row"].is_valid()).sort_by("row")
            blank = bytes(3 * THUMBNAIL**2)
            joined = b"".join(value or blank for value in table["thumbnail"].to_pylist())
            return np.frombuffer(joined, dtype=np.uint8).reshape(len(table), -1), table["key"].to_pylist()

        self.read = read

    def __call__(self, later: np.ndarray, earlier: np.ndarray) -> np.ndarray:
        """[N] orders, twice → [N] whether they show the same."""
        near = np.zeros(len(later), dtype=bool)
        for start in range(0, len(later), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            apart = np.abs(self.thumbnails(later[part]) - self.thumbnails(earlier[part]))
            near[part] = (apart.mean(axis=1) <= self.settings["colour"]) & (
                apart.max(axis=1) <= self.settings["detail"]
            )
        return near

    def thumbnails(self, orders: np.ndarray) -> np.ndarray:
        found = np.empty((len(orders), 3 * THUMBNAIL**2), dtype=np.int16)
        ranks = orders >> ROW_BITS
        for rank in np.unique(ranks):
            mine = ranks == rank
            found[mine] = self.read(int(rank))[0][orders[mine] & (2**ROW_BITS - 1)]
        return found

    def key(self, order: int) -> str:
        return self.read(order >> ROW_BITS)[1][order & (2**ROW_BITS - 1)]
