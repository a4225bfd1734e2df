"""The books of a curated dataset: one ledger row for every raw sample, one marker for every finished raw shard.

shards/ID.arrow  thumbnails/ID.arrow  ledger/ID.parquet  selection/ID.parquet  markers/ID.json      ID: the raw shard
versions/0001.json: which shards a version holds, with their entries of the books (versions.py)
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.records import CURATED, LEDGER, SCORES, SELECTION, THUMBNAILS
from pipelines.settings import OwlError

BLANK = bytes(THUMBNAILS.field("thumbnail").type.byte_width)


def shard_id(path: str) -> str:
    """A raw shard's name in the books: its file name, and a hash that tells same-named files apart."""
    stem = os.path.splitext(storage.name_of(path))[0]
    return f"{stem}-{hashlib.sha256(path.encode()).hexdigest()[:6]}"


def finished(output: str) -> set[str]:
    """Ids of the raw shards whose marker is written."""
    return {storage.name_of(path).removesuffix(".json") for path in storage.listing(f"{output}/markers", ".json")}


def write_shard(output: str, shard: str, raw: str, rows: Iterable[dict]) -> dict:
    """Writes a raw shard's curated Arrow as its rows come, then thumbnails and ledger, then the marker. Returns the
    marker. Only one record batch of pictures is held at a time."""
    books: list[dict] = []
    thumbnails: list[bytes] = []
    sha256 = storage.write_batches(f"{output}/shards/{shard}.arrow", CURATED, entered(rows, books, thumbnails))
    table = pa.table({"thumbnail": thumbnails}, schema=THUMBNAILS)
    storage.write_arrow(f"{output}/thumbnails/{shard}.arrow", table)
    write_ledger(output, shard, pa.Table.from_pylist(books, schema=LEDGER))
    return write_marker(output, shard, raw, [row["reason"] for row in books], len(thumbnails), sha256)


def entered(rows: Iterable[dict], books: list[dict], thumbnails: list[bytes]) -> Iterator[pa.RecordBatch]:
    """Enters judged rows into the books; yields the fit ones, in record batches."""
    kept: list[dict] = []
    for row in rows:
        row["verdict"] = "dropped"
        if row["reason"] is None:
            row["verdict"], row["row"] = "kept", len(thumbnails)
            thumbnails.append(row.get("thumbnail") or BLANK)
            kept.append(curated_row(row))
        books.append({name: row.get(name) for name in LEDGER.names})
        if len(kept) == storage.BATCH_ROWS:
            yield pa.RecordBatch.from_pylist(kept, schema=CURATED)
            kept.clear()
    if kept:
        yield pa.RecordBatch.from_pylist(kept, schema=CURATED)


def write_marker(output: str, shard: str, raw: str, reasons: list[str | None], rows: int, sha256: str) -> dict:
    """A shard's entry of the books as it stands before later decisions: ``rows`` are in its Arrow file, which has this
    ``sha256``."""
    marker = {"shard": shard, "raw": raw, "rows": rows, "sha256": sha256, "in": len(reasons), **counts(reasons)}
    storage.write_json(f"{output}/markers/{shard}.json", marker)
    return marker


def curated_row(row: dict) -> dict:
    """A judged row with the picture's size as it is stored, where the ledger has it as declared."""
    width, height = row.get("stored") or (None, None)
    return {**row, "width": width, "height": height}


def append_rows(output: str, shard: str, rows: list[dict]) -> str:
    """Adds judged rows to a curated shard and its thumbnails: both are copied, and replaced whole. Until the ledger
    names them, nobody looks at the new rows. Returns the shard's sha256."""
    thumbnails = [{"thumbnail": row.get("thumbnail") or BLANK} for row in rows]
    append(f"{output}/thumbnails/{shard}.arrow", pa.RecordBatch.from_pylist(thumbnails, schema=THUMBNAILS))
    curated = [curated_row(row) for row in rows]
    return append(f"{output}/shards/{shard}.arrow", pa.RecordBatch.from_pylist(curated, schema=CURATED))


def append(path: str, batch: pa.RecordBatch) -> str:
    return storage.write_batches(path, batch.schema, [*storage.read_arrow(path).to_batches(), batch])


def counts(reasons: list[str | None]) -> dict[str, Any]:
    dropped = Counter(reason for reason in reasons if reason is not None)
    return {"kept": len(reasons) - sum(dropped.values()), "dropped": dict(sorted(dropped.items()))}


def manifest_of(dataset: str) -> dict[str, Any]:
    """Of a folder, or of one of its versions, FOLDER@3. Raises OwlError where there is no finished curated dataset."""
    output, version = folder_and_version(dataset)
    path = version_path(output, version) if version else f"{output}/manifest.json"
    if storage.exists(path):
        return storage.read_json(path)
    if version and storage.exists(f"{output}/manifest.json"):
        raise OwlError(f"{output} has no version {version}; `owl curate versions {output}` lists them")
    raise OwlError(f"no curated dataset at {output}: it has no manifest.json; run owl curate first")


def folder_and_version(dataset: str) -> tuple[str, int | None]:
    """ "s3://data/pairs@3" → ("s3://data/pairs", 3); without a version, None for it."""
    found = re.fullmatch(r"(.+)@(\d+)", dataset)
    return (found[1], int(found[2])) if found else (dataset, None)


def version_path(output: str, version: int) -> str:
    return f"{output}/versions/{version:04d}.json"


def read_ledger(output: str, shard: str, columns: list[str] | None = None) -> pa.Table:
    return storage.read_parquet(f"{output}/ledger/{shard}.parquet", columns)


def embeddings(output: str, shard: str, rows: pa.ChunkedArray) -> pa.Array:
    """The picture's embedding of each ledger row; null where it was not scored."""
    path = f"{output}/scores/{shard}.parquet"
    if not storage.exists(path):
        return pa.nulls(len(rows), SCORES.field("embedding").type)
    scores = storage.read_parquet(path, ["row", "embedding"])
    return scores["embedding"].combine_chunks().take(places_of(rows, scores["row"]))


def places_of(rows: pa.ChunkedArray, among: pa.ChunkedArray) -> pa.Array:
    """Where each of ``rows`` stands in ``among``; null where it does not, or is null."""
    return pc.index_in(rows.combine_chunks(), value_set=among.combine_chunks(), skip_nulls=True)


def write_ledger(output: str, shard: str, table: pa.Table) -> None:
    storage.write_parquet(f"{output}/ledger/{shard}.parquet", table)


def decide(output: str, shard: str, decided: list[dict], instead_of: Collection[str]) -> dict:
    """Enters later decisions on one shard's curated rows, each {"place" in the ledger, "reason", "detail"}: verdicts
    into its ledger, rows into its selection; the Arrow shard stays as it is. Earlier decisions for the reasons
    ``instead_of`` are taken back, so that this can be repeated. Returns the shard's entry of the books."""
    marker = storage.read_json(f"{output}/markers/{shard}.json")
    if not decided and not storage.exists(f"{output}/selection/{shard}.parquet"):
        return marker  # nothing was ever decided
    table = read_ledger(output, shard)
    before = pc.and_(table["row"].is_valid(), pc.is_in(table["reason"], value_set=pa.array(instead_of, pa.string())))
    if decided or pc.any(before).as_py():
        in_order = sorted(decided, key=lambda item: item["place"])
        mask = np.zeros(len(table), dtype=bool)
        mask[[item["place"] for item in in_order]] = True
        for name in ("reason", "detail"):
            column = pc.if_else(before, pa.scalar(None, pa.string()), table[name])
            new = pa.array([item[name] for item in in_order], pa.string())
            table = set_column(table, name, pc.replace_with_mask(column.combine_chunks(), pa.array(mask), new))
        table = set_column(table, "verdict", pc.if_else(table["reason"].is_null(), "kept", "dropped"))
        write_ledger(output, shard, table)
        write_selection(output, shard, table)
    return {**marker, **counts(table["reason"].to_pylist())}


def set_column(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), LEDGER.field(name), column)


def write_selection(output: str, shard: str, table: pa.Table) -> None:
    out = pc.and_(table["row"].is_valid(), table["reason"].is_valid())
    storage.write_parquet(
        f"{output}/selection/{shard}.parquet", table.filter(out).select(SELECTION.names).cast(SELECTION)
    )


def selected_rows(output: str, shard: str) -> pa.Array | None:
    """Rows of a curated shard that later decisions leave out; None where there are no decisions."""
    path = f"{output}/selection/{shard}.parquet"
    if not storage.exists(path):
        return None
    return storage.read_parquet(path, ["row"])["row"].combine_chunks()


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
