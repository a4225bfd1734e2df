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
from typing import Any

import numpy as np
import torch

from owl_model import OwlProcessor
from owl_model.chat import Encoded
from pipelines import storage
from pipelines.curation import ledger
from pipelines.records import caption_messages, parts
from pipelines.settings import OwlError
from pipelines.training.order import Order


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
    """The selected rows of curated datasets. Files are memory-mapped and opened when they are first needed."""

    def __init__(self, folders: list[str]):
        self.paths: list[str] = []
        self.selected: list[np.ndarray] = []
        for folder in folders:
            if not storage.exists(f"{folder}/manifest.json"):
                raise OwlError(f"no curated dataset at {folder}: it has no manifest.json; run owl curate first")
            for entry in storage.read_json(f"{folder}/manifest.json")["shards"]:
                shard = entry["shard"]
                path = f"{folder}/shards/{shard}.arrow"
                rows = storage.open_arrow(path).read_all().num_rows
                left_out = ledger.selected_rows(folder, shard)
                keep = np.arange(rows) if left_out is None else np.setdiff1d(np.arange(rows), left_out.to_numpy())
                if len(keep):
                    self.paths.append(path)
                    self.selected.append(keep)
        if not self.paths:
            raise OwlError(f"nothing to train on: {', '.join(folders)} kept no sample")
        self.tables: dict[int, Any] = {}

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(len(keep) for keep in self.selected)

    def read(self, shard: int, row: int) -> dict:
        """One sample as a dictionary of CURATED's columns."""
        if shard not in self.tables:
            self.tables[shard] = storage.open_arrow(self.paths[shard]).read_all()
        return self.tables[shard].slice(int(self.selected[shard][row]), 1).to_pylist()[0]


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
    the vision encoder is frozen. ``pictures`` off keeps the words alone (language pretraining)."""

    def __init__(
        self,
        dataset: Dataset,
        processor: OwlProcessor,
        order: Order,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        pictures: bool = True,
        encode_pictures: Callable[[torch.Tensor], torch.Tensor] | None = None,
        keep_bytes: int = 1 << 30,
    ):
        self.dataset, self.processor, self.order, self.batch_size = dataset, processor, order, batch_size
        self.rank, self.world, self.pictures = rank, world, pictures
        self.encode_pictures = encode_pictures
        self.kept = Kept(keep_bytes)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of steps start … stop - 1, each read while the one before is in use."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed") as ahead:
            coming = ahead.submit(self.batch, start) if start < stop else None
            for step in range(start, stop):
                batch = coming.result()  # type: ignore[union-attr]
                coming = ahead.submit(self.batch, step + 1) if step + 1 < stop else None
                yield batch

    def batch(self, step: int) -> Batch:
        encoded: list[Encoded] = []
        pictures: list[tuple[tuple, bytes]] = []
        keys: list[str] = []
        for position in self.order.batch(step, self.batch_size, self.rank, self.world):
            shard, row = self.order.at(position)
            sample = self.dataset.read(shard, row)
            encoded.append(self.processor.encode(self.conversation(sample, position)))
            keys.append(sample["key"])
            if self.pictures:
                images = [image for image in (sample["image"], *(sample["more_images"] or [])) if image]
                pictures += [((shard, row, index), image) for index, image in enumerate(images)]
        inputs = self.processor.collate(encoded)
        supervised = (inputs["labels"][:, 1:] != -100).sum(dim=1)
        if pictures:
            name = "pixel_values" if self.encode_pictures is None else "vision_features"
            inputs[name] = self.prepared(pictures)
        return Batch(inputs, keys, int(supervised.sum()), int((supervised == 0).sum()))

    def conversation(self, sample: dict, position: int) -> list[dict]:
        """A sample's messages; of several captions the epoch's turn decides which is told."""
        if sample["messages"] is None:
            captions = sample["caption"]
            epoch = position // len(self.order)
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
