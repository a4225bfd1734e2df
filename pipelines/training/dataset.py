"""The selected rows of curated datasets, opened where and when they are needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.curation import ledger
from pipelines.records import CURATED
from pipelines.settings import OwlError
from pipelines.training.cache import Cache
from pipelines.training.order import Mixture, Order, Ordered, shares_of


class Dataset:
    """The selected rows of curated datasets, or of some of their versions (FOLDER@3). Opening reads their manifests
    alone; files are memory-mapped, and selections read, when a shard is first needed."""

    def __init__(self, folders: list[str], cache: Cache | None = None):
        self.cache = cache or Cache(CACHE_BYTES)
        self.shards: list[Shard] = []
        for number, folder in enumerate(folders):
            plain, _ = ledger.folder_and_version(folder)
            for entry in ledger.manifest_of(folder)["shards"]:
                if entry["kept"]:
                    self.shards.append(Shard(number, plain, entry["shard"], entry["kept"], entry.get("sha256")))
        empty = [folder for number, folder in enumerate(folders) if not self.rows_of(number)]
        if empty or not folders:
            raise OwlError(f"nothing to train on: {', '.join(empty) or 'no dataset'} kept no sample")
        self.folders = folders
        self.opened: OrderedDict[int, tuple[pa.Table, np.ndarray]] = OrderedDict()

    @property
    def is_remote(self) -> bool:
        return any("://" in folder for folder in self.folders)

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(shard.kept for shard in self.shards)

    def rows_of(self, folder: int) -> tuple[int, ...]:
        return tuple(shard.kept for shard in self.shards if shard.folder_number == folder)

    def order(self, seed: int, weights: list[float]) -> Ordered:
        """All samples once an epoch; or, with weights, each folder's share of what is seen."""
        if not weights:
            return Order(self.rows, seed)
        orders = (Order(self.rows_of(number), seed + number) for number in range(len(self.folders)))
        return Mixture(tuple(orders), shares_of(weights), seed)

    def used(self, order: Ordered, positions: int) -> dict[str, int]:
        """How many samples of each folder the first ``positions`` hold."""
        used = dict.fromkeys(self.folders, 0)
        for shard, number in zip(self.shards, order.seen(positions), strict=True):
            used[self.folders[shard.folder_number]] += int(number)
        return used

    def read(self, shard: int, row: int, columns: Sequence[str] = CURATED.names) -> dict:
        """One sample as a dictionary of some of CURATED's columns."""
        if shard not in self.opened:
            self.opened[shard] = self.open(self.shards[shard])
            if len(self.opened) > OPEN_SHARDS:
                self.opened.popitem(last=False)
        self.opened.move_to_end(shard)
        table, selected = self.opened[shard]
        row = int(selected[row])
        return {name: table[name][row].as_py() for name in columns}

    def fetch_ahead(self, shard: int) -> None:
        if shard not in self.opened:
            self.cache.fetch_ahead(*self.file_of(self.shards[shard]))

    def file_of(self, shard: Shard) -> tuple[str, str | None]:
        return f"{shard.folder}/shards/{shard.name}.arrow", shard.sha256

    def open(self, shard: Shard) -> tuple[pa.Table, np.ndarray]:
        """A shard's rows, and which of them are selected. Raises OwlError where these are not those of the manifest."""
        table = self.cache.table(*self.file_of(shard))
        left_out = ledger.selected_rows(shard.folder, shard.name)
        rows = np.arange(len(table))
        selected = rows if left_out is None else np.setdiff1d(rows, left_out.to_numpy())
        if len(selected) != shard.kept:
            raise OwlError(
                f"{shard.folder} changed: {shard.name} has {len(selected)} samples, its manifest {shard.kept}"
            )
        return table, selected


OPEN_SHARDS = 256
CACHE_BYTES = 20 << 30


class Shard(NamedTuple):
    folder_number: int
    folder: str
    name: str
    kept: int
    sha256: str | None
