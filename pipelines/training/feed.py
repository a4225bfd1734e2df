"""Curated Arrow → batches: rows by position, pictures through owl_model, one batch read ahead.

The feed reads Arrow itself, since Ray Data 2.60 has no iterator state and a resumed run must open at any position at
once. What stays the same over the epochs is computed once and kept, within a limit: a picture's pixels, or, where
the vision encoder is frozen, its features.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from owl_model import OwlProcessor
from owl_model.chat import Encoded
from pipelines import storage
from pipelines.curation import ledger
from pipelines.records import caption_messages, parts
from pipelines.settings import OwlError
from pipelines.training.order import Mixture, Order, Ordered, positions, shares_of


@dataclass
class Batch:
    inputs: dict[str, torch.Tensor]
    """input_ids, attention_mask, labels [B, L]; pixel_values [N, 3, H, W] or vision_features [N, P, D]."""
    keys: list[str]
    """Which samples these are."""
    supervised: int
    """Tokens that have a label; the first of a row never has one."""
    unsupervised: int
    """Samples without any such token: they add nothing to the loss, and are counted."""


class Dataset:
    """The selected rows of curated datasets. Opening reads their manifests alone; files are memory-mapped, and
    selections read, when a shard is first needed."""

    def __init__(self, folders: list[str]):
        self.shards: list[Shard] = []
        for number, folder in enumerate(folders):
            if not storage.exists(f"{folder}/manifest.json"):
                raise OwlError(f"no curated dataset at {folder}: it has no manifest.json; run owl curate first")
            for entry in storage.read_json(f"{folder}/manifest.json")["shards"]:
                if entry["kept"]:
                    self.shards.append(Shard(number, folder, entry["shard"], entry["kept"]))
        empty = [folder for number, folder in enumerate(folders) if not self.rows_of(number)]
        if empty or not folders:
            raise OwlError(f"nothing to train on: {', '.join(empty) or 'no dataset'} kept no sample")
        self.folders = folders
        self.opened: dict[int, tuple[pa.Table, np.ndarray]] = {}

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
            used[shard.folder] += int(number)
        return used

    def read(self, shard: int, row: int) -> dict:
        """One sample as a dictionary of CURATED's columns."""
        if shard not in self.opened:
            self.opened[shard] = self.open(self.shards[shard])
        table, selected = self.opened[shard]
        return table.slice(int(selected[row]), 1).to_pylist()[0]

    def open(self, shard: Shard) -> tuple[pa.Table, np.ndarray]:
        """A shard's rows, and which of them are selected. Raises OwlError where these are not those of the manifest."""
        table = storage.open_arrow(f"{shard.folder}/shards/{shard.name}.arrow").read_all()
        left_out = ledger.selected_rows(shard.folder, shard.name)
        rows = np.arange(len(table))
        selected = rows if left_out is None else np.setdiff1d(rows, left_out.to_numpy())
        if len(selected) != shard.kept:
            raise OwlError(
                f"{shard.folder} changed: {shard.name} has {len(selected)} samples, its manifest {shard.kept}"
            )
        return table, selected


class Shard(NamedTuple):
    folder_number: int
    folder: str
    name: str
    kept: int


class Kept:
    """The last-used values under keys, up to a number of bytes."""

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self.values: OrderedDict[Any, torch.Tensor] = OrderedDict()

    def get(self, key: Any) -> torch.Tensor | None:
        if key in self.values:
            self.values.move_to_end(key)
        return self.values.get(key)

    def put(self, key: Any, value: torch.Tensor) -> None:
        self.values[key] = value
        self.size += value.nbytes
        while self.size > self.limit:
            self.size -= self.values.popitem(last=False)[1].nbytes


class Feed:
    """Batches of one rank. ``encode_pictures`` maps pixels [N, 3, H, W] to features [N, P, D]; give it only where
    the vision encoder is frozen. ``pictures`` off keeps the words alone (language pretraining); ``always_look`` has the
    model look at a blank one where there is none, as ranks must that share weights out."""

    def __init__(
        self,
        dataset: Dataset,
        processor: OwlProcessor,
        order: Ordered,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        micro_batch: int = 0,
        pictures: bool = True,
        always_look: bool = False,
        encode_pictures: Callable[[torch.Tensor], torch.Tensor] | None = None,
        keep_bytes: int = 1 << 30,
    ):
        self.dataset, self.processor, self.order, self.batch_size = dataset, processor, order, batch_size
        self.rank, self.world, self.pictures, self.always_look = rank, world, pictures, always_look
        largest = -(-batch_size // world)
        self.pieces = -(-largest // (micro_batch or largest))
        self.encode_pictures = encode_pictures
        self.kept = Kept(keep_bytes)

    def batches(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """For steps start … stop - 1 this rank's micro-batches, read while those before are in use. Every rank has
        equally many."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed") as ahead:
            coming = ahead.submit(self.batch, start) if start < stop else None
            for step in range(start, stop):
                batch = coming.result()  # type: ignore[union-attr]
                coming = ahead.submit(self.batch, step + 1) if step + 1 < stop else None
                yield batch

    def batch(self, step: int) -> list[Batch]:
        mine = positions(step, self.batch_size, self.rank, self.world)
        return [self.micro_batch(piece.tolist()) for piece in np.array_split(np.array(mine), self.pieces)]

    def micro_batch(self, places: list[int]) -> Batch:
        encoded: list[Encoded] = []
        pictures: list[tuple[tuple, bytes]] = []
        keys: list[str] = []
        for position in places:
            shard, row, epoch = self.order.at(position)
            sample = self.dataset.read(shard, row)
            encoded.append(self.processor.encode(self.conversation(sample, position, epoch)))
            keys.append(sample["key"])
            if self.pictures:
                images = [image for image in (sample["image"], *(sample["more_images"] or [])) if image]
                pictures += [((shard, row, index), image) for index, image in enumerate(images)]
        inputs = self.processor.collate(encoded)
        supervised = (inputs["labels"][:, 1:] != -100).sum(dim=1)
        if pictures:
            name = "pixel_values" if self.encode_pictures is None else "vision_features"
            inputs[name] = self.prepared(pictures)
        elif self.always_look:
            size = self.processor.image_processor.image_size
            blank = torch.zeros(1, 3, size, size)
            inputs["look_only"] = blank if self.encode_pictures is None else self.encode_pictures(blank)
        return Batch(inputs, keys, int(supervised.sum()), int((supervised == 0).sum()))

    def conversation(self, sample: dict, position: int, epoch: int) -> list[dict]:
        """A sample's messages; of several captions the epoch's turn decides which is told."""
        if sample["messages"] is None:
            captions = sample["caption"]
            pick = np.random.default_rng((self.order.seed, epoch, position)).integers(len(captions))
            messages = caption_messages(captions[pick])
        else:
            messages = sample["messages"]
        if self.pictures:
            return messages
        return [{**m, "content": [p for p in parts(m["content"]) if p["type"] == "text"]} for m in messages]

    def prepared(self, pictures: list[tuple[tuple, bytes]]) -> torch.Tensor:
        """Pixels, or features where they can be kept; what was prepared before is not prepared again."""
        missing = [(key, data) for key, data in pictures if self.kept.get(key) is None]
        fresh = {}
        if missing:
            pixels = torch.stack([self.processor.image_processor.pixels(data) for _, data in missing])
            values = pixels if self.encode_pictures is None else self.encode_pictures(pixels)
            fresh = {key: value.clone() for (key, _), value in zip(missing, values, strict=True)}
        rows = torch.stack([fresh[key] if key in fresh else self.kept.get(key) for key, _ in pictures])
        for key, value in fresh.items():
            self.kept.put(key, value)
        return rows
