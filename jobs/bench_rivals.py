"""The other ways of `owl bench curation`, each written as its users would write it well.

    python -m jobs.bench_rivals WAY RAW_FOLDER --out FOLDER

All drop pictures whose shorter side is below 128 px or whose sides differ by more than 3 times, and captions of fewer
than three words; all store a JPEG of 224 px on the shorter side, its caption and its key in columns.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.rivals import with_pillow as pillow
from jobs.rivals.with_pillow import FEWEST, SIDE, is_fit


def bare(raw: str, out: str) -> None:
    """Owl's own reading, decoding and storing in two processes, and nothing else: no engine, no books."""
    Path(out).mkdir(parents=True)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(bare_shard, [(str(path), out) for path in sorted(Path(raw).glob("*.tar"))], chunksize=1)


def bare_shard(path: str, out: str) -> None:
    import torch

    from owl_model.images import ImageError, open_header
    from pipelines.curation.decode import Pictures, decode_jpeg, encode, shrink
    from pipelines.curation.sources import read_tar

    torch.set_num_threads(1)
    pictures = Pictures(short_side=SIDE)
    rows: dict[str, list] = {"key": [], "image": [], "caption": []}
    for sample in read_tar(path):
        if not sample.captions or len(sample.captions[0].split()) < FEWEST:
            continue
        try:
            header = open_header(sample.images[0])
        except ImageError:
            continue
        if not is_fit(header):
            continue
        pixels = decode_jpeg(sample.images[0], header, SIDE * pictures.margin)
        if pixels is None:
            continue
        rows["key"].append(sample.key)
        small = pixels if min(header.size) <= SIDE else shrink(pixels, *header.size, SIDE)
        rows["image"].append(encode(small, pictures))
        rows["caption"].append(sample.captions[0])
    table = pa.table(rows)
    with pa.OSFile(f"{out}/{Path(path).stem}.arrow", "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def with_pillow(data: bytes, caption: str) -> bytes | None:
    return None if len(caption.split()) < FEWEST else pillow.shrink(data)


def ray_data(raw: str, out: str) -> None:
    """Ray Data as its guides recommend: read_webdataset, map_batches, write_parquet."""
    import ray
    import ray.data

    ray.init(num_cpus=2, logging_level="ERROR", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    data = ray.data.read_webdataset(raw, decoder=None, suffixes=["jpg", "txt"])
    data.map_batches(ray_batch, batch_size=64).write_parquet(out)


def ray_batch(batch: dict) -> dict:
    rows: dict[str, list] = {"key": [], "image": [], "caption": []}
    for key, data, text in zip(batch["__key__"], batch["jpg"], batch["txt"], strict=True):
        caption = text.decode() if isinstance(text, bytes) else text
        if (stored := with_pillow(data, caption)) is not None:
            rows["key"].append(key)
            rows["image"].append(stored)
            rows["caption"].append(caption)
    return rows


def webdataset(raw: str, out: str) -> None:
    """The webdataset library and Pillow in two processes."""
    Path(out).mkdir(parents=True)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(webdataset_shard, [(str(path), out) for path in sorted(Path(raw).glob("*.tar"))], chunksize=1)


def webdataset_shard(path: str, out: str) -> None:
    import webdataset as wds

    rows: dict[str, list] = {"key": [], "image": [], "caption": []}
    for sample in wds.WebDataset(path, shardshuffle=False):
        caption = sample["txt"].decode()
        if (stored := with_pillow(sample["jpg"], caption)) is not None:
            rows["key"].append(sample["__key__"])
            rows["image"].append(stored)
            rows["caption"].append(caption)
    pq.write_table(pa.table(rows), f"{out}/{Path(path).stem}.parquet")


WAYS: dict[str, Callable[[str, str], None]] = {
    "bare": bare,
    "ray_data": ray_data,
    "webdataset": webdataset,
}

if __name__ == "__main__":
    way, raw_folder, _, out_folder = sys.argv[1:]
    WAYS[way](raw_folder, out_folder)
