"""Curated Arrow → batches: rows by position, pictures through owl_model, one batch read ahead.

The feed reads Arrow itself, since Ray Data 2.60 has no iterator state and a resumed run must open at any position at
once. What stays the same over the epochs is computed once and kept, within a limit: a picture's pixels, or, where
the vision encoder is frozen, its features. A picture is known by its content, so that twenty questions about one are
no more work than one. Encoding is part of the step, and runs with it; the feed only spares it what is known.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch

from owl_model import OwlProcessor
from owl_model.chat import IGNORE, Encoded
from owl_model.images import random_crop
from pipelines.records import caption_messages, parts
from pipelines.training.dataset import Dataset
from pipelines.training.order import Ordered, Place, positions
from pipelines.training.packing import plan


@dataclass
class Batch:
    inputs: dict[str, torch.Tensor]
    """input_ids, labels [B, L], and attention_mask or, where rows hold several samples, position_ids [B, L];
    pixel_values [N, 3, H, W], or what Feed.encoded makes vision_features [N, P, D] of."""
    keys: list[str]
    """Which samples these are."""
    datasets: torch.Tensor
    """[T]: which dataset each supervised token is of, in reading order."""
    supervised: int
    """Tokens that have a label; the first of a row never has one."""
    unsupervised: int
    """Samples without any such token: they add nothing to the loss, and are counted."""
    cut: int
    """Samples that were longer than allowed."""
    tokens: int
    """Tokens of samples."""
    padding: int
    """Tokens of none."""
    pictures: int
    views: list[View]
    """Its pictures, where the vision encoder is frozen."""


class View(NamedTuple):
    """A picture on its way into a frozen encoder."""

    key: Hashable
    features: torch.Tensor | None
    """[P, D], where they are known; if not, its pixels stand among the batch's pixel_values."""


class Sample(NamedTuple):
    """One sample's words, ready, and where its pictures are."""

    place: Place
    key: str
    encoded: Encoded
    cut: bool


class Kept:
    """The first values under their keys, up to a number of bytes; any thread asks and gives.

    Nothing is driven out: where an epoch holds more than fits, its order would drive each one out before it is due."""

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self.values: dict[Hashable, torch.Tensor] = {}
        self.lock = Lock()

    def get(self, key: Hashable) -> torch.Tensor | None:
        return self.values.get(key)

    def put(self, key: Hashable, value: torch.Tensor) -> None:
        """Keeps a copy of it, in the host's memory."""
        with self.lock:
            if key in self.values or self.size + value.nbytes > self.limit:
                return
            self.values[key] = value.detach().to("cpu", copy=True)
            self.size += value.nbytes


class Looks(NamedTuple):
    """How a stage looks at pictures."""

    pictures: bool = True
    """Off keeps the words alone (language pretraining)."""
    crop: float = 1.0
    """The least share of a picture's area that is shown, cropped at random, by sample and epoch."""
    always: bool = False
    """Has the model look at a blank picture where there is none, as ranks must that share weights out."""
    encode: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Pixels [N, 3, H, W] → features [N, P, D]; only where the vision encoder is frozen."""
    keep_bytes: int = 1 << 30
    """Of prepared pictures that are kept for the next epoch."""


class Feed:
    """Batches of one rank: ``micro_batch`` rows at once (0: all), each one sample or, with ``pack_tokens``, as many as
    fit in that many tokens. Samples longer than ``max_tokens`` are cut."""

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
        pack_tokens: int = 0,
        max_tokens: int = 2048,
        looks: Looks = Looks(),  # noqa: B008
        threads: int = 1,
    ):
        self.dataset, self.processor, self.order, self.batch_size = dataset, processor, order, batch_size
        self.rank, self.world, self.micro_batch = rank, world, micro_batch
        self.pack_tokens, self.max_tokens, self.looks = pack_tokens, max_tokens, looks
        self.kept = Kept(looks.keep_bytes if looks.crop == 1.0 else 0)
        self.fetched = 0
        self.decoding = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="pictures")

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
        self.fetch_ahead(step)
        rows, pieces = self.packed(step) if self.pack_tokens else self.apart(step)
        edges = np.linspace(0, len(rows), pieces + 1).astype(int)
        batches = [self.micro_batch_of(rows[first:last]) for first, last in pairwise(edges)]
        return [pinned(batch) for batch in batches] if torch.cuda.is_available() else batches

    def apart(self, step: int) -> tuple[list[list[Sample]], int]:
        """This rank's rows of one sample each, and in how many pieces every rank computes its own."""
        mine = positions(step, self.batch_size, self.rank, self.world)
        return [[self.sample(position)] for position in mine], self.pieces(-(-self.batch_size // self.world))

    def packed(self, step: int) -> tuple[list[list[Sample]], int]:
        """Likewise, with rows of several samples: planned from the lengths of all of the global batch."""
        together = [self.sample(position) for position in positions(step, self.batch_size)]
        lengths = [len(sample.encoded.ids) for sample in together]
        pictures = [sample.encoded.images for sample in together]
        ranks = plan(lengths, pictures, self.pack_tokens, self.world)
        rows = [[together[index] for index in row] for row in ranks[self.rank]]
        return rows, self.pieces(max(len(rank) for rank in ranks))

    def pieces(self, rows: int) -> int:
        return -(-rows // (self.micro_batch or rows))

    def fetch_ahead(self, step: int) -> None:
        """Has remote shards copied some steps before they are needed."""
        for later in range(max(step, self.fetched), step + STEPS_AHEAD if self.dataset.is_remote else 0):
            for position in positions(later, self.batch_size):
                self.dataset.fetch_ahead(self.order.at(position).shard)
        self.fetched = step + STEPS_AHEAD

    def sample(self, position: int) -> Sample:
        place = self.order.at(position)
        row = self.dataset.read(place.shard, place.row, ("key", "caption", "messages"))
        encoded = self.processor.encode(self.conversation(row, position, place.epoch))
        if len(encoded.ids) <= self.max_tokens:
            return Sample(place, row["key"], encoded, False)
        ids, labels = encoded.ids[: self.max_tokens], encoded.labels[: self.max_tokens]
        if ids.count(self.processor.image_token_id) < encoded.images * self.processor.visual_tokens:
            return Sample(place, row["key"], self.blank(), True)  # no room for its pictures
        return Sample(place, row["key"], Encoded(ids, labels, encoded.images), True)

    def blank(self) -> Encoded:
        """A sample that says nothing."""
        return Encoded([self.processor.pad_id], [IGNORE], 0)

    def micro_batch_of(self, rows: list[list[Sample]]) -> Batch:
        samples = [sample for row in rows for sample in row]
        written = [[sample.encoded for sample in row] for row in rows] or [[self.blank()]]
        inputs = (
            self.processor.pack(written) if self.pack_tokens else self.processor.collate([row[0] for row in written])
        )
        labelled = inputs["labels"][:, 1:] != IGNORE
        sources = torch.zeros_like(inputs["labels"])
        for line, row in zip(sources, rows, strict=False):
            places = [self.dataset.shards[sample.place.shard].folder_number for sample in row]
            found = torch.repeat_interleave(torch.tensor(places), torch.tensor([len(s.encoded.ids) for s in row]))
            line[: len(found)] = found
        pictures = [(sample.place, index) for sample in samples for index in range(sample.encoded.images)]
        views: list[View] = []
        if pictures:
            views, pixels = self.pictures_in(pictures)
            inputs |= {} if pixels is None else {"pixel_values": pixels}
        elif self.looks.always:
            size = self.processor.image_processor.image_size
            inputs["look_only"] = torch.zeros(1, 3, size, size)
        tokens = sum(len(sample.encoded.ids) for sample in samples)
        return Batch(
            inputs,
            keys=[sample.key for sample in samples],
            datasets=sources[:, 1:][labelled],
            supervised=int(labelled.sum()),
            unsupervised=sum(all(label == IGNORE for label in sample.encoded.labels[1:]) for sample in samples),
            cut=sum(sample.cut for sample in samples),
            tokens=tokens,
            padding=inputs["labels"].numel() - tokens,
            pictures=len(pictures),
            views=views,
        )

    def conversation(self, sample: dict, position: int, epoch: int) -> list[dict]:
        """A sample's messages; of several captions the epoch's turn decides which is told."""
        if sample["messages"] is None:
            captions = sample["caption"]
            pick = np.random.default_rng((self.order.seed, epoch, position)).integers(len(captions))
            messages = caption_messages(captions[pick])
        else:
            messages = sample["messages"]
        if self.looks.pictures:
            return messages
        return [{**m, "content": [p for p in parts(m["content"]) if p["type"] == "text"]} for m in messages]

    def pictures_in(self, wanted: list[tuple[Place, int]]) -> tuple[list[View], torch.Tensor | None]:
        """Views of them, and the pixels [M, 3, H, W] that have to be looked at: of all where vision trains, otherwise
        of those without features, each once."""
        keys = [self.key_of(*which) for which in wanted]
        known = {key: self.kept.get(key) for key in keys}
        missing = {key: which for key, which in zip(keys, wanted, strict=True) if known[key] is None}
        encoded = [self.encoded_picture(*which) for which in missing.values()]
        fresh = dict(zip(missing, self.decoding.map(self.pixels, missing.values(), encoded), strict=True))
        if self.looks.encode is None:
            for key, pixels in fresh.items():
                self.kept.put(key, pixels)
            return [], torch.stack([fresh[key] if (pixels := known[key]) is None else pixels for key in keys])
        return [View(key, known[key]) for key in keys], torch.stack(list(fresh.values())) if fresh else None

    def encoded(self, batch: Batch) -> Batch:
        """A batch whose pictures, where vision is frozen, are features; the step calls it, on the model's device."""
        if self.looks.encode is None:
            return batch
        inputs = dict(batch.inputs)
        if "look_only" in inputs:
            inputs["look_only"] = self.looks.encode(inputs["look_only"])
        if batch.views:
            fresh = {}
            if "pixel_values" in inputs:
                missing = dict.fromkeys(view.key for view in batch.views if view.features is None)
                fresh = dict(zip(missing, self.looks.encode(inputs.pop("pixel_values")), strict=True))
            for key, features in fresh.items():
                self.kept.put(key, features)
            device = next(iter(fresh.values())).device if fresh else torch.device("cpu")
            rows = [fresh[v.key] if v.features is None else v.features.to(device) for v in batch.views]
            inputs["vision_features"] = torch.stack(rows)
        return replace(batch, inputs=inputs, views=[])

    def key_of(self, place: Place, index: int) -> Hashable:
        """By what a picture is known: what it holds, or, where that is not written down, its place; every crop of it,
        by the epoch too."""
        if self.looks.crop < 1.0:
            return (*place, index)
        if index == 0:
            sha256 = self.dataset.read(place.shard, place.row, ("sha256",))["sha256"]
            if sha256:
                return self.dataset.shards[place.shard].folder_number, sha256
        return (*place[:2], index)

    def encoded_picture(self, place: Place, index: int) -> bytes:
        if index == 0:
            return self.dataset.read(place.shard, place.row, ("image",))["image"]
        return self.dataset.read(place.shard, place.row, ("more_images",))["more_images"][index - 1]

    def pixels(self, which: tuple[Place, int], data: bytes) -> torch.Tensor:
        if self.looks.crop == 1.0:
            return self.processor.image_processor.pixels(data)
        place, index = which
        random = np.random.default_rng((self.order.seed, 11, *place, index))
        return self.processor.image_processor.pixels(data, lambda image: random_crop(image, self.looks.crop, random))


STEPS_AHEAD = 32


def pinned(batch: Batch) -> Batch:
    batch.inputs = {name: value.pin_memory() for name, value in batch.inputs.items()}
    return batch
