"""The books of a curated dataset: one ledger row for every raw sample, one marker for every finished raw shard.

shards/ID.arrow  ledger/ID.parquet  selection/ID.parquet  markers/ID.json      ID names the raw shard
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.records import CURATED, LEDGER, SELECTION
from pipelines.settings import OwlError


def shard_id(path: str) -> str:
    """A raw shard's name in the books: its file name, and a hash that tells same-named files apart."""
    stem = os.path.splitext(storage.name_of(path))[0]
    return f"{stem}-{hashlib.sha256(path.encode()).hexdigest()[:6]}"


def finished(output: str) -> set[str]:
    """Ids of the raw shards whose marker is written."""
    return {storage.name_of(path).removesuffix(".json") for path in storage.listing(f"{output}/markers", ".json")}


def write_shard(output: str, shard: str, raw: str, rows: Iterable[dict]) -> dict:
    """Writes a raw shard's curated Arrow as its rows come, then its ledger, then the marker. Returns the marker. Only
    one record batch of pictures is held at a time."""
    books: list[dict] = []
    kept: list[dict] = []
    number = 0
    with storage.open_write(f"{output}/shards/{shard}.arrow") as file, pa.ipc.new_file(file, CURATED) as writer:
        for row in rows:
            row["verdict"] = "dropped"
            if row["reason"] is None:
                row["verdict"], row["row"] = "kept", number
                number += 1
                width, height = row.get("stored") or (None, None)
                kept.append({**row, "width": width, "height": height})
            books.append({name: row.get(name) for name in LEDGER.names})
            if len(kept) == storage.BATCH_ROWS:
                writer.write_batch(pa.RecordBatch.from_pylist(kept, schema=CURATED))
                kept.clear()
        if kept:
            writer.write_batch(pa.RecordBatch.from_pylist(kept, schema=CURATED))
    write_ledger(output, shard, pa.Table.from_pylist(books, schema=LEDGER))
    marker = {"shard": shard, "raw": raw, "in": len(books), **counts([row["reason"] for row in books])}
    storage.write_json(f"{output}/markers/{shard}.json", marker)
    return marker


def counts(reasons: list[str | None]) -> dict[str, Any]:
    dropped = Counter(reason for reason in reasons if reason is not None)
    return {"kept": len(reasons) - sum(dropped.values()), "dropped": dict(sorted(dropped.items()))}


def manifest_of(output: str) -> dict[str, Any]:
    """Raises OwlError where there is no finished curated dataset."""
    if not storage.exists(f"{output}/manifest.json"):
        raise OwlError(f"no curated dataset at {output!r}: it has no manifest.json")
    return storage.read_json(f"{output}/manifest.json")


def read_ledger(output: str, shard: str, columns: list[str] | None = None) -> pa.Table:
    with storage.open_read(f"{output}/ledger/{shard}.parquet") as file:
        return pq.read_table(file, columns=columns)


def write_ledger(output: str, shard: str, table: pa.Table) -> None:
    with storage.open_write(f"{output}/ledger/{shard}.parquet") as file:
        pq.write_table(table, file, compression="zstd")


def deselect(output: str, shard: str, decided: list[dict], instead_of: Collection[str] = ()) -> dict:
    """Enters later decisions on one shard's curated rows, each {"row", "key", "reason", "detail"}: verdicts into its
    ledger, rows into its selection; the Arrow shard stays as it is. Earlier decisions for the reasons ``instead_of``
    are taken back first, so that this can be repeated. Returns the shard's entry of the books."""
    table = read_ledger(output, shard)
    reasons, details, rows = (table[name].to_pylist() for name in ("reason", "detail", "row"))
    by_row = {item["row"]: item for item in decided}
    for index, row in enumerate(rows):
        if row is None:
            continue
        if reasons[index] in instead_of:
            reasons[index] = details[index] = None
        if found := by_row.get(row):
            reasons[index], details[index] = found["reason"], found["detail"]
    verdicts = ["kept" if reason is None else "dropped" for reason in reasons]
    for name, values in (("verdict", verdicts), ("reason", reasons), ("detail", details)):
        table = table.set_column(table.schema.get_field_index(name), LEDGER.field(name), pa.array(values, pa.string()))
    write_ledger(output, shard, table)
    out = pc.and_(table["row"].is_valid(), table["reason"].is_valid())
    with storage.open_write(f"{output}/selection/{shard}.parquet") as file:
        pq.write_table(table.filter(out).select(SELECTION.names).cast(SELECTION), file)
    marker = storage.read_json(f"{output}/markers/{shard}.json")
    return {"shard": shard, "raw": marker["raw"], "in": len(reasons), **counts(reasons)}


def selected_rows(output: str, shard: str) -> pa.Array | None:
    """Rows of a curated shard that later decisions leave out; None where there are no decisions."""
    path = f"{output}/selection/{shard}.parquet"
    if not storage.exists(path):
        return None
    with storage.open_read(path) as file:
        return pq.read_table(file, columns=["row"])["row"].combine_chunks()


def check_books(entries: list[dict]) -> None:
    """In = kept + Σ dropped, for every shard. Raises AssertionError naming the shard."""
    for entry in entries:
        out = entry["kept"] + sum(entry["dropped"].values())
        if entry["in"] != out:
            raise AssertionError(f"the books of {entry['shard']} do not balance: {entry['in']} in, {out} accounted for")


def total(entries: list[dict]) -> dict[str, Any]:
    dropped: Counter = Counter()
    for entry in entries:
        dropped.update(entry["dropped"])
    counted = {"in": sum(e["in"] for e in entries), "kept": sum(e["kept"] for e in entries)}
    return {**counted, "dropped": dict(sorted(dropped.items()))}
