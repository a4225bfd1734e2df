"""A curated dataset in other tools' formats: WebDataset tars, Parquet or Arrow, in files of about one size.

Rows that were deselected stay out; order is that of the dataset. Each file is written by a task of its own, which reads
the record batches it needs and no more.
"""

from __future__ import annotations

import io
import json
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from pipelines import storage
from pipelines.curation import ledger
from pipelines.records import CURATED
from pipelines.settings import OwlError

Piece = tuple[str, int, int]
"""(shard, first record batch, one past the last)."""


def export(dataset: str, target: str, form: str, megabytes: int) -> dict[str, Any]:
    """Writes a dataset, or a version of it, into the folder ``target`` as ``form`` (a name of FORMS), in files of about
    ``megabytes``. Returns {"files", "rows"}. Raises OwlError for an unknown form or an unfinished dataset."""
    if form not in FORMS:
        raise OwlError(f"unknown format {form!r}; known: {', '.join(FORMS)}")
    output, _ = ledger.folder_and_version(dataset)
    shards = [entry["shard"] for entry in ledger.manifest_of(dataset)["shards"]]
    parts = list(plan(output, shards, megabytes << 20))
    ending = {"webdataset": "tar", "parquet": "parquet", "arrow": "arrow"}[form]
    names = [f"{target}/part-{number:05d}.{ending}" for number in range(len(parts))]
    rows = ray.get([write_part.remote(output, part, name, form) for part, name in zip(parts, names, strict=True)])
    return {"files": len(names), "rows": sum(rows)}


def plan(output: str, shards: list[str], size: int) -> Iterator[list[Piece]]:
    """Record batches in order, gathered until they hold ``size`` bytes of pictures and words."""
    part: list[Piece] = []
    held = 0
    for shard in shards:
        reader = storage.open_arrow(f"{output}/shards/{shard}.arrow")
        for index in range(reader.num_record_batches):
            part.append((shard, index, index + 1))
            held += reader.get_batch(index).nbytes
            if held >= size:
                yield part
                part, held = [], 0
    if part:
        yield part


@ray.remote(num_cpus=1)
def write_part(output: str, part: list[Piece], path: str, form: str) -> int:
    with storage.open_write(path) as file:
        return FORMS[form](file, selected(output, part))


def selected(output: str, part: list[Piece]) -> Iterator[pa.RecordBatch]:
    """The rows of some record batches that later decisions left in."""
    for shard, first, end in part:
        reader = storage.open_arrow(f"{output}/shards/{shard}.arrow")
        out = ledger.selected_rows(output, shard)
        begins = [0]
        for index in range(end):
            begins.append(begins[-1] + reader.get_batch(index).num_rows)
        for index in range(first, end):
            batch = reader.get_batch(index)
            if out is not None and len(out):
                numbers = pa.array(range(begins[index], begins[index + 1]), pa.int32())
                batch = batch.filter(pc.invert(pc.is_in(numbers, value_set=out)))
            if batch.num_rows:
                yield batch


WORDS = [name for name in CURATED.names if name not in ("image", "more_images")]


def write_arrow(file, batches: Iterator[pa.RecordBatch]) -> int:
    rows = 0
    with pa.ipc.new_file(file, CURATED) as writer:
        for batch in batches:
            writer.write_batch(batch)
            rows += batch.num_rows
    return rows


def write_parquet(file, batches: Iterator[pa.RecordBatch]) -> int:
    rows = 0
    with pq.ParquetWriter(file, CURATED, compression="zstd", compression_level=1, use_dictionary=WORDS) as writer:
        for batch in batches:
            writer.write_batch(batch)
            rows += batch.num_rows
    return rows


def write_webdataset(file, batches: Iterator[pa.RecordBatch]) -> int:
    """KEY.jpg (and KEY.1.jpg …), KEY.txt with the first caption, KEY.json with the rest of the row. A key's dots and
    leading slashes become underscores, since WebDataset cuts names at the first dot."""
    rows = 0
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for batch in batches:
            for row in batch.to_pylist():
                folder, base = posixpath.split(row["key"].lstrip("/").replace("..", "__"))
                name = posixpath.join(folder, base.replace(".", "_"))
                pictures = [data for data in (row["image"], *(row["more_images"] or [])) if data]
                members = [
                    (f"{kind(data)}" if i == 0 else f"{i}.{kind(data)}", data) for i, data in enumerate(pictures)
                ]
                if row["caption"]:
                    members.append(("txt", row["caption"][0].encode()))
                rest = {k: v for k, v in row.items() if k not in ("image", "more_images") and v is not None}
                rest["captions"] = rest.pop("caption", None)
                members.append(("json", json.dumps(rest, ensure_ascii=False).encode()))
                for ending, data in members:
                    add_file(tar, f"{name}.{ending}", data)
            rows += batch.num_rows
    return rows


def add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


STARTS = (
    (b"\xff\xd8", "jpg"),
    (b"\x89PNG", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)


def known_kind(data: bytes) -> str | None:
    """The ending that a picture's first twelve bytes tell; None where they are those of no format that is read."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((ending for start, ending in STARTS if data.startswith(start)), None)


def kind(data: bytes) -> str:
    """The ending of a picture that could be decoded."""
    return known_kind(data) or "tif"


FORMS: dict[str, Callable[[Any, Iterator[pa.RecordBatch]], int]] = {
    "webdataset": write_webdataset,
    "parquet": write_parquet,
    "arrow": write_arrow,
}
