"""Duplicate pictures, found by moving keys and never pictures.

Two pictures are duplicates if their bytes are equal, or if their pHashes agree in 8 - ``radius`` of their eight bytes
and their 16×16 thumbnails differ by at most ``colour`` grey levels on average and ``detail`` anywhere. The one that
comes first stays: order is (shard, row), so the decision does not depend on how the work was spread.

The hash only finds candidates, by the pigeonhole principle (Manku, Jain, Das Sarma 2007, section 3): where at most
``radius`` bits differ, at least 8 - radius bytes are equal; so every choice of that many bytes becomes a key, and a
keyed exchange on Ray brings equal keys together. Each row is sent C(8, radius) times, 28 times at radius 6, at about
850 bytes. The thumbnails decide.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pyarrow as pa
import ray.data

from pipelines.curation import ledger
from pipelines.settings import Settings

CHUNKS = 8
MOST_LIKE = 256
"""How many earlier rows of one key a row is compared with; more share a key only where pictures are blank."""


class Deduplication(Settings):
    radius: int = 6
    """Bits of the 64-bit pHash that may differ between near duplicates without one being missed; 0 to 7."""
    colour: float = 2.5
    """Mean difference of the 16×16 thumbnails, in grey levels, up to which two pictures count as the same."""
    detail: int = 12
    """Largest difference of the thumbnails anywhere, likewise: a shape that moved a little is another picture."""


KEYED = pa.schema(
    [
        ("bucket", pa.string()),
        ("order", pa.int64()),  # rank of (shard, row): the smaller one stays
        ("shard", pa.string()),
        ("row", pa.int32()),
        ("key", pa.string()),
        ("sha256", pa.string()),
        ("thumbnail", pa.binary()),
    ]
)
FOUND = pa.schema(
    [
        ("shard", pa.string()),
        ("row", pa.int32()),
        ("key", pa.string()),
        ("reason", pa.string()),
        ("kept_instead", pa.string()),
        ("kept_order", pa.int64()),
    ]
)


def find_duplicates(output: str, shards: list[str], settings: Deduplication, blocks: int) -> dict[str, list[dict]]:
    """Shard id → its duplicate rows. ``blocks`` is how many parts the keys are exchanged into.

    Only the duplicates themselves come back, never the keys.
    """
    work = [{"output": output, "shard": shard, "rank": rank} for rank, shard in enumerate(shards)]
    keyed = ray.data.from_items(work, override_num_blocks=min(len(work), 4 * blocks)).map_batches(
        keyed_rows, batch_format="pyarrow", fn_kwargs={"radius": settings.radius}
    )
    found = keyed.repartition(blocks, keys=["bucket"]).map_batches(
        duplicates_within, batch_size=None, batch_format="pyarrow", fn_kwargs={"settings": settings.model_dump()}
    )
    best: dict[tuple[str, int], dict] = {}
    for item in found.iter_rows():
        place = (item["shard"], item["row"])
        # Exact before near, then the earliest: the same pair may meet in several buckets.
        rank = (item["reason"], item["kept_order"])
        if place not in best or rank < (best[place]["reason"], best[place]["kept_order"]):
            best[place] = item
    by_shard: dict[str, list[dict]] = {shard: [] for shard in shards}
    for item in best.values():
        by_shard[item["shard"]].append(item)
    return by_shard


def keyed_rows(work: pa.Table, radius: int) -> pa.Table:
    """The pictures of some shards, once for each of their keys."""
    choices = list(combinations(range(CHUNKS), CHUNKS - radius))
    tables = []
    for item in work.to_pylist():
        table = ledger.read_ledger(item["output"], item["shard"], ["row", "key", "sha256", "phash", "thumbnail"])
        table = table.filter(pa.compute.and_(table["row"].is_valid(), table["phash"].is_valid()))
        if not len(table):
            continue
        hashes = np.array([int(value, 16) for value in table["phash"].to_pylist()], dtype=np.uint64)
        chunks = hashes[:, None] >> np.arange(0, 64, 8, dtype=np.uint64) & np.uint64(255)  # [N, 8]
        order = item["rank"] * 2**32 + table["row"].to_numpy().astype(np.int64)
        columns = {
            "order": pa.array(order, pa.int64()),
            "shard": pa.array([item["shard"]] * len(table)),
            **{name: table[name] for name in ("row", "key", "sha256")},
            "thumbnail": table["thumbnail"],
        }
        for number, choice in enumerate(choices):
            codes = [f"{number}:" + bytes(row).hex() for row in chunks[:, choice].astype(np.uint8)]
            tables.append(pa.table({"bucket": codes, **columns}).cast(KEYED))
    return pa.concat_tables(tables) if tables else KEYED.empty_table()


def duplicates_within(table: pa.Table, settings: dict) -> pa.Table:
    """Duplicates among rows that share a bucket: sorted, every row is compared with those before it, lag by lag."""
    if "bucket" not in table.column_names or not len(table):
        return FOUND.empty_table()
    table = table.sort_by([("bucket", "ascending"), ("order", "ascending")]).combine_chunks()
    codes = np.unique(table["bucket"].to_numpy(zero_copy_only=False), return_inverse=True)[1]
    sha = table["sha256"].to_numpy(zero_copy_only=False)
    joined = b"".join(table["thumbnail"].to_pylist())
    thumbnails = np.frombuffer(joined, dtype=np.uint8).reshape(len(table), -1).astype(np.int16)
    first = np.full(len(table), -1)  # index of the earliest duplicate of each row
    exact = np.zeros(len(table), dtype=bool)
    for lag in range(1, MOST_LIKE + 1):
        later = np.nonzero(codes[lag:] == codes[:-lag])[0] + lag
        if not len(later):
            break
        earlier = later - lag
        apart = np.abs(thumbnails[later] - thumbnails[earlier])
        near = (apart.mean(axis=1) <= settings["colour"]) & (apart.max(axis=1) <= settings["detail"])
        same = sha[later] == sha[earlier]
        better = (near & ~exact[later]) | same
        first[later[better]] = earlier[better]
        exact[later[same]] = True
    rows = np.nonzero(first >= 0)[0]
    keys = table["key"].take(pa.array(first[rows]))
    return pa.table(
        {
            "shard": table["shard"].take(pa.array(rows)),
            "row": table["row"].take(pa.array(rows)),
            "key": table["key"].take(pa.array(rows)),
            "reason": ["duplicate_exact" if exact[row] else "duplicate_near" for row in rows],
            "kept_instead": keys,
            "kept_order": table["order"].take(pa.array(first[rows])),
        }
    ).cast(FOUND)
