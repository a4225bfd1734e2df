"""Files on local disk or any fsspec scheme (s3://…), by the same calls. A file appears whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import posixpath
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem


def join(folder: str, *names: str) -> str:
    return posixpath.join(str(folder), *names)


def name_of(path: str) -> str:
    """The last part of a path."""
    return posixpath.basename(str(path).rstrip("/"))


def filesystem(path: str) -> tuple[AbstractFileSystem, str]:
    """Where a path lies, and its name there. Listings are not kept: other processes write, too."""
    path = str(path)
    return url_to_fs(path, use_listings_cache=False) if "://" in path else url_to_fs(path)


def exists(path: str) -> bool:
    fs, plain = filesystem(path)
    return fs.exists(plain)


def size(path: str) -> int:
    """Bytes of a file."""
    fs, plain = filesystem(path)
    return fs.size(plain) or 0


def listing(folder: str, ending: str) -> list[str]:
    """Full paths of the files directly in ``folder`` whose names end so, sorted; empty if there is no such folder."""
    fs, plain = filesystem(folder)
    if not fs.exists(plain):
        return []
    names = sorted(name_of(path) for path in fs.ls(plain, detail=False))
    return [join(folder, name) for name in names if name.endswith(ending) and not name.startswith(".")]


def folders(folder: str) -> list[str]:
    """Full paths of the folders directly in ``folder``, sorted."""
    fs, plain = filesystem(folder)
    if not fs.exists(plain):
        return []
    found = [name_of(entry["name"]) for entry in fs.ls(plain, detail=True) if entry["type"] == "directory"]
    return [join(folder, name) for name in sorted(found)]


def sha256(path: str) -> str:
    """Of a file's bytes."""
    with open_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def open_read(path: str) -> IO[bytes]:
    if "://" not in str(path):
        return open(path, "rb")  # half a millisecond sooner, which counts where files are small and many
    fs, plain = filesystem(path)
    return fs.open(plain, "rb")


@contextlib.contextmanager
def open_write(path: str) -> Iterator[IO[bytes]]:
    """Writes beside the target and renames; object stores complete the upload on close. Nothing stays on failure."""
    fs, plain = filesystem(path)
    if not isinstance(fs, LocalFileSystem):
        file = fs.open(plain, "wb")
        try:
            yield file
        except BaseException:
            file.discard()
            file.closed = True  # or it would complete the upload when it is collected
            raise
        file.close()
        return
    os.makedirs(posixpath.dirname(plain), exist_ok=True)
    partial = posixpath.join(posixpath.dirname(plain), f".{posixpath.basename(plain)}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, plain)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


def sweep(folder: str) -> None:
    """Removes what killed writers left half-written anywhere below a local folder. To be called when nobody writes
    there. Object stores keep such parts out of sight; a bucket's rule for incomplete uploads ends them."""
    fs, plain = filesystem(folder)
    if isinstance(fs, LocalFileSystem):
        for left in Path(plain).rglob(".*.partial"):
            left.unlink(missing_ok=True)


def read_bytes(path: str) -> bytes:
    with open_read(path) as file:
        return file.read()


def read_json(path: str) -> Any:
    with open_read(path) as file:
        return json.load(file)


def write_bytes(path: str, data: bytes) -> None:
    with open_write(path) as file:
        file.write(data)


def write_json(path: str, value: Any) -> None:
    write_bytes(path, json.dumps(value, indent=1, ensure_ascii=False).encode())


def write_text(path: str, text: str) -> None:
    write_bytes(path, text.encode())


THROUGH = 1.0
"""Seconds in which small puts that began together have ended."""


def create(path: str, data: bytes) -> bool:
    """A small file that nobody wrote before, of content that nobody else would write; False where it is there. Of
    several at once, one succeeds: by a link on a local disk; by a conditional put (If-None-Match) on S3, and since not
    every server's is atomic (Swift's is not), by what is there when all who began together are through."""
    fs, plain = filesystem(path)
    if not isinstance(fs, LocalFileSystem):
        try:
            fs.pipe_file(plain, data, mode="create")
        except OSError:  # stores call it by many names
            if not fs.exists(plain):
                raise
            return False
        time.sleep(THROUGH)
        return read_bytes(path) == data
    folder, name = posixpath.split(plain)
    os.makedirs(folder, exist_ok=True)
    partial = posixpath.join(folder, f".{name}.{uuid.uuid4().hex}.partial")
    while True:
        try:
            Path(partial).write_bytes(data)
            os.link(partial, plain)
            return True
        except FileExistsError:
            return False
        except FileNotFoundError:  # swept away by whoever is through with this folder
            continue
        finally:
            Path(partial).unlink(missing_ok=True)


BATCH_ROWS = 256
"""Rows of a record batch: few, so that a reader can open any few rows of a file."""


def write_arrow(path: str, table: pa.Table) -> None:
    """An Arrow IPC file of small record batches."""
    write_batches(path, table.schema, table.to_batches(max_chunksize=BATCH_ROWS))


def write_batches(path: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> str:
    """An Arrow IPC file of record batches as they come; returns its sha256."""
    with open_write(path) as file:
        hashed = Hashed(file)
        with pa.ipc.new_file(pa.PythonFile(hashed, "w"), schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        return hashed.digest.hexdigest()


class Hashed(io.RawIOBase):
    """Passes on what is written to it, and keeps the sha256 of it all."""

    def __init__(self, file: IO[bytes]):
        self.file, self.digest = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)


def open_arrow(path: str) -> pa.ipc.RecordBatchFileReader:
    """Memory-mapped; a remote file is first copied to this machine's cache, once."""
    local = fsspec.open_local(f"simplecache::{path}") if "://" in str(path) else str(path)
    return pa.ipc.open_file(pa.memory_map(str(local)))


def read_arrow(path: str) -> pa.Table:
    """The whole of an Arrow IPC file; nothing of a remote one is kept here."""
    if "://" not in str(path):
        return open_arrow(path).read_all()
    with open_read(path) as file:
        return pa.ipc.open_file(file).read_all()


def write_parquet(path: str, table: pa.Table) -> None:
    with open_write(path) as file:
        pq.write_table(table, file, compression="zstd")


def read_parquet(path: str, columns: list[str] | None = None) -> pa.Table:
    with open_read(path) as file:
        return pq.ParquetFile(file).read(columns)


def remove(path: str) -> None:
    """A local or remote file, or a folder with all that is in it, if it is there."""
    fs, plain = filesystem(path)
    if isinstance(fs, LocalFileSystem) and os.path.isdir(plain):
        shutil.rmtree(plain, ignore_errors=True)
    elif fs.exists(plain):
        fs.rm(plain, recursive=True)


@contextlib.contextmanager
def local_folder(path: str) -> Iterator[str]:
    """A folder on this machine: itself, or a copy of a remote one for as long as the block lasts."""
    if "://" not in path:
        yield path
        return
    fs, plain = filesystem(path)
    with tempfile.TemporaryDirectory(prefix="owl-copy-") as here:
        fs.get(f"{plain}/", here, recursive=True)
        yield here


@contextlib.contextmanager
def folder_for(path: str) -> Iterator[str]:
    """A folder on this machine to write to; what it holds is at ``path`` when the block ends well."""
    if "://" not in path:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="owl-copy-") as here:
        yield here
        write_folder(here, path)


def write_folder(local: str, path: str) -> None:
    """Copies a folder's files, all below it too, to a local or remote one."""
    fs, plain = filesystem(path)
    if isinstance(fs, LocalFileSystem):
        shutil.copytree(local, plain, dirs_exist_ok=True)
    else:
        fs.put(f"{local}/", plain, recursive=True)
