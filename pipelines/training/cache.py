"""Remote shards on this machine's disk: copied ahead, checked, shared by the workers here, and held to a size."""

from __future__ import annotations

import hashlib
import os
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa

from pipelines import storage
from pipelines.settings import OwlError

TRIES = 16


class Cache:
    """Local copies of remote files, the least recently opened removed first. A file that is removed while somebody has
    it mapped stays readable until it is closed. Local files are left where they are."""

    def __init__(self, limit: int, folder: str = ""):
        self.limit = limit
        self.folder = Path(folder or f"{tempfile.gettempdir()}/owl-shards-{os.getuid()}")
        self.copying = ThreadPoolExecutor(max_workers=4, thread_name_prefix="shards")
        self.coming: dict[str, Future[str]] = {}

    def fetch_ahead(self, path: str, sha256: str | None) -> None:
        """Begins to copy a file that is soon to be opened."""
        if "://" in path and path not in self.coming:
            self.coming[path] = self.copying.submit(self.copy, path, sha256)

    def table(self, path: str, sha256: str | None) -> pa.Table:
        """A file's rows, memory-mapped. Raises OwlError where its content is not what ``sha256`` says, or where it is
        removed again and again before it can be opened."""
        if "://" not in path:
            return storage.open_arrow(path).read_all()
        for _ in range(TRIES):
            self.fetch_ahead(path, sha256)
            found = self.coming[path].result()
            try:
                os.utime(found)
                return storage.open_arrow(found).read_all()
            except FileNotFoundError:  # another file, or another worker, needed its room
                del self.coming[path]
        raise OwlError(f"{path} did not stay in the cache until it was opened, {TRIES} times: raise cache_gigabytes")

    def copy(self, path: str, sha256: str | None) -> str:
        name = hashlib.sha256(f"{path} {sha256}".encode()).hexdigest()
        target = self.folder / f"{name}.arrow"
        if target.exists():
            return str(target)
        digest = hashlib.sha256()
        with storage.open_read(path) as source, storage.open_write(str(target)) as file:
            while block := source.read(1 << 22):
                digest.update(block)
                file.write(block)
            if sha256 and digest.hexdigest() != sha256:
                raise OwlError(f"{path} is not what its manifest says: its sha256 is {digest.hexdigest()}")
        self.make_room(target)
        return str(target)

    def make_room(self, newest: Path) -> None:
        seen = []
        for file in self.folder.glob("*.arrow"):
            try:
                seen.append((file.stat().st_mtime, file.stat().st_size, file))
            except FileNotFoundError:  # another worker was faster
                continue
        total = sum(size for _, size, _ in seen)
        for _, size, file in sorted(seen):
            if total <= self.limit or file == newest:
                break
            file.unlink(missing_ok=True)
            total -= size
