"""How fast training is fed, how soon it resumes, and what its checkpoints cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from jobs.bench_curation_set import write_set
from jobs.parts import assemble, write_tiny_language_model
from jobs.recipes import Parts
from owl_model import OwlProcessor
from pipelines import storage
from pipelines.curation.curate import curate
from pipelines.curation.decode import Pictures
from pipelines.curation.export import export
from pipelines.curation.options import Curation
from pipelines.records import CURATED, caption_messages
from pipelines.settings import OwlError
from pipelines.training.dataset import Dataset
from pipelines.training.feed import Feed, Looks
from pipelines.training.order import Order
from pipelines.training.stages import Optimization, Stage
from pipelines.training.train import train

BATCH = 32
LENGTH = 128

# --- feeding ---------------------------------------------------------------------------------------------------------


def prepared(folder: str, pictures: int) -> dict[str, str]:
    """The same pictures as Arrow, Parquet and WebDataset, and a processor."""
    arrow = pairs(folder, pictures)
    for form in ("parquet", "webdataset"):
        if not Path(f"{folder}/{form}").exists():
            export(arrow, f"{folder}/{form}", form, megabytes=16)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = Parts(vision={**shape, "image_size": 224}, language_model=f"{folder}/language", abstractor=shape)
    assemble(parts.model_copy(update={"template": "plain"}), f"{folder}/owl")
    return {name: f"{folder}/{name}" for name in ("arrow", "parquet", "webdataset", "owl")}


def pairs(folder: str, pictures: int) -> str:
    """Curated pictures of 224 px on the shorter side, as Arrow, and a language model of their words; what is there
    stays."""
    raw, arrow = f"{folder}/raw", f"{folder}/arrow"
    if not Path(f"{arrow}/manifest.json").exists():
        write_set(raw, pictures)
        curate([raw], arrow, Curation(pictures=Pictures(short_side=224), deduplication=None))
    words = "the old man in a red coat with two small dogs on street near market by river under morning light"
    write_tiny_language_model([words], f"{folder}/language")
    return arrow


def tensors(processor: OwlProcessor, data: list[bytes], captions: list[str]) -> dict[str, torch.Tensor]:
    """What all ways end with: pixels, ids and labels of a batch."""
    inputs = processor.collate([processor.encode(caption_messages(caption)) for caption in captions])
    return {**inputs, "pixel_values": torch.stack([processor.image_processor.pixels(each) for each in data])}


def plain(places: dict[str, str], processor: OwlProcessor) -> Iterator[Any]:
    """The same Arrow files from first to last, in one thread: no order, no reading ahead."""
    for path in storage.listing(f"{places['arrow']}/shards", ".arrow"):
        table = storage.open_arrow(path).read_all()
        for start in range(0, len(table), BATCH):
            rows = table.slice(start, BATCH)
            yield tensors(processor, rows["image"].to_pylist(), [texts[0] for texts in rows["caption"].to_pylist()])


def owl_feed(places: dict[str, str], processor: OwlProcessor) -> Iterator[Any]:
    """Owl's own, with two threads for pictures."""
    dataset = Dataset([places["arrow"]])
    order = Order(dataset.rows, 0)
    feed = Feed(dataset, processor, order, BATCH, looks=Looks(keep_bytes=0), threads=2)
    yield from feed.batches(0, len(order) // BATCH)


def ray_data(places: dict[str, str], processor: OwlProcessor) -> Iterator[Any]:
    """ray.data.read_parquet → map_batches → iter_torch_batches, in order, so that a run could be repeated."""

    def prepare(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        made = tensors(processor, list(batch["image"]), [texts[0] for texts in batch["caption"]])
        ids = torch.nn.functional.pad(made["input_ids"], (0, LENGTH - made["input_ids"].shape[1]))
        return {"input_ids": ids.numpy(), "pixel_values": made["pixel_values"].numpy()}

    ray.data.DataContext.get_current().enable_progress_bars = False
    data = ray.data.read_parquet(places["parquet"], columns=["image", "caption"])
    yield from data.map_batches(prepare, batch_size=BATCH).iter_torch_batches(batch_size=BATCH)


def data_loader(places: dict[str, str], processor: OwlProcessor) -> Iterator[Any]:
    """PyTorch's DataLoader with two processes over webdataset."""
    import webdataset as wds

    def read(sample: dict[str, bytes]) -> tuple[bytes, str]:
        return next(sample[name] for name in ("jpg", "png", "webp") if name in sample), sample["txt"].decode()

    def together(rows: list[tuple[bytes, str]]) -> dict[str, torch.Tensor]:
        return tensors(processor, *map(list, zip(*rows, strict=True)))

    tars = storage.listing(places["webdataset"], ".tar")
    data = wds.WebDataset(tars, shardshuffle=False, nodesplitter=None).map(read)
    yield from torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=2, collate_fn=together)


WAYS: dict[str, Callable[[dict[str, str], OwlProcessor], Iterator[Any]]] = {
    "plain reading, one thread": plain,
    "owl": owl_feed,
    "Ray Data, iter_torch_batches": ray_data,
    "DataLoader over webdataset": data_loader,
}


def measure_feed(folder: str, pictures: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Samples a second of each way, and seconds to the first batch: medians over ``repeats`` turns, taken in rotation
    after one that does not count. Raises OwlError where webdataset is not installed."""
    if find_spec("webdataset") is None:
        raise OwlError("one of the ways is PyTorch's DataLoader over webdataset: pip install webdataset")
    torch.set_num_threads(1)
    places = prepared(folder, pictures)
    processor = OwlProcessor.from_pretrained(places["owl"])
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for turn in range(repeats + 1):
        for name, way in WAYS.items():
            began = time.monotonic()
            batches = way(places, processor)
            next(batches)
            first = time.monotonic() - began
            count = BATCH + sum(BATCH for _ in batches)
            if turn:
                seen[name].append((count / (time.monotonic() - began), first))
    for name, figures in seen.items():
        rates, firsts = zip(*figures, strict=True)
        yield {
            "way": name,
            "samples_per_second": round(statistics.median(rates), 1),
            "first_batch_s": round(statistics.median(firsts), 3),
        }


# --- resuming --------------------------------------------------------------------------------------------------------


def write_long(folder: str, shards: int, rows: int) -> None:
    """A curated dataset of many shards of short texts."""
    entries = []
    for number in range(shards):
        name = f"{number:05d}"
        entries.append({"shard": name, "kept": rows})
        path = f"{folder}/shards/{name}.arrow"
        if not Path(path).exists():
            columns = {
                "key": [f"{number}-{row}" for row in range(rows)],
                "messages": [
                    [
                        {"role": "user", "content": [{"type": "text", "text": "the old man"}]},
                        {"role": "assistant", "content": [{"type": "text", "text": f"red coat {row}"}]},
                    ]
                    for row in range(rows)
                ],
            }
            full = {name: columns.get(name, pa.nulls(rows)) for name in CURATED.names}
            storage.write_arrow(path, pa.table(full, schema=CURATED))
    storage.write_json(f"{folder}/manifest.json", {"shards": entries})


def measure_resume(folder: str, position: int, repeats: int) -> dict[str, Any]:
    """Seconds until a dataset of 1,000 shards is open, and until the first batch from ``position`` on is there."""
    places = prepared(folder, 500)
    write_long(f"{folder}/long", 1000, 1200)
    processor = OwlProcessor.from_pretrained(places["owl"])
    opened, first = [], []
    for turn in range(repeats):
        began = time.monotonic()
        dataset = Dataset([f"{folder}/long"])
        opened.append(time.monotonic() - began)
        feed = Feed(dataset, processor, dataset.order(turn, []), BATCH)  # another seed: no order is known yet
        next(feed.batches(position // BATCH, position // BATCH + 1))
        first.append(time.monotonic() - began)
    return {
        "samples": sum(dataset.rows),
        "position": position,
        "open_s": round(statistics.median(opened), 3),
        "first_batch_s": round(statistics.median(first), 3),
    }


# --- checkpoints -----------------------------------------------------------------------------------------------------


def measure_checkpoints(folder: str, steps: int, every: int) -> Iterator[dict[str, Any]]:
    """Share of a run's time that it stands still for checkpoints, written beside training and not."""
    places = prepared(folder, 500)
    shape = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 6}
    parts = Parts(
        vision={**shape, "image_size": 56, "patch_size": 14},
        language_model=f"{folder}/language",
        abstractor={**shape, "num_hidden_layers": 4, "num_queries": 8},
        template="plain",
    )
    assemble(parts, f"{folder}/large")
    for beside in (True, False, True, False):
        settings = Stage(
            data=[places["arrow"]],
            start=f"{folder}/large",
            steps=steps,
            batch_size=BATCH,
            optimization=Optimization(warmup=5),
            checkpoint_every=every,
            checkpoint_beside=beside,
            log_every=1,
        )
        with TemporaryDirectory(dir=folder) as run:
            began = time.monotonic()
            history = train("stage1", settings, f"{run}/run")["history"][every:]  # after the start
            seconds = sum(entry["seconds"] for entry in history)
            yield {
                "beside": beside,
                "stalled": round(sum(entry["checkpoint"] * entry["seconds"] for entry in history) / seconds, 4),
                "waited_for_data": round(sum(entry["wait"] * entry["seconds"] for entry in history) / seconds, 4),
                "step_s": round(seconds / len(history), 3),
                "run_s": round(time.monotonic() - began, 1),
            }
