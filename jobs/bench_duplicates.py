"""What deduplication finds, and what it takes: copies changed in known ways; ledgers of many millions of pictures."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from PIL import Image, ImageDraw, ImageEnhance

from pipelines import storage
from pipelines.curation import ledger
from pipelines.curation.decode import fingerprints
from pipelines.curation.dedup import remove_duplicates
from pipelines.curation.likeness import REACH, Deduplication, alike_pictures, choices, picture_key
from pipelines.curation.sources import find_shards, read_shard
from pipelines.records import LEDGER, THUMBNAILS
from pipelines.settings import OwlError

# --- what is found ---------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def sized(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def cropped(image: Image.Image, share: float) -> Image.Image:
    """Without ``share`` of its width and height, half of it on each side."""
    x, y = image.width * share / 2, image.height * share / 2
    return image.crop((round(x), round(y), round(image.width - x), round(image.height - y)))


def marked(image: Image.Image) -> Image.Image:
    out = image.copy()
    place = (image.width * 0.2, image.height * 0.45)
    ImageDraw.Draw(out, "RGBA").text(place, "SAMPLE PHOTO", fill=(255, 255, 255, 140), font_size=image.width // 8)
    return out


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG quality 95": lambda image: encoded(image, 95),
    "JPEG quality 60": lambda image: encoded(image, 60),
    "JPEG quality 30": lambda image: encoded(image, 30),
    "half the size": lambda image: sized(image, 0.5),
    "a third of the size, quality 60": lambda image: encoded(sized(image, 1 / 3), 60),
    "twice the size": lambda image: sized(image, 2),
    "cropped by 2 %": lambda image: cropped(image, 0.02),
    "cropped by 5 %": lambda image: cropped(image, 0.05),
    "brighter by 10 %": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "brighter by 30 %": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "contrast up by 20 %": lambda image: ImageEnhance.Contrast(image).enhance(1.2),
    "half-transparent words across": marked,
}
Marks = tuple[np.ndarray, np.ndarray]


def find_copies(raw: list[str], pictures: int) -> Iterator[dict[str, Any]]:
    """For each change the share of copies that are found, by Owl and by imagehash (equal, as cleanvision's default
    asks, and within 4 and 10 bits); then the pairs of different pictures that are taken for copies."""
    try:
        import imagehash
    except ImportError:
        raise OwlError("owl bench duplicates compares with imagehash: pip install imagehash") from None
    originals = read_pictures(raw, pictures)
    settings = Deduplication()
    ours = [marks_of(image) for image in originals]
    theirs = [imagehash.phash(image) for image in originals]
    for name, change in CHANGES.items():
        copies = [change(image) for image in originals]
        found = [alike(one, marks_of(two), settings) for one, two in zip(ours, copies, strict=True)]
        apart = np.array([one - imagehash.phash(two) for one, two in zip(theirs, copies, strict=True)])
        yield {"change": name, "owl": share(found), **{f"imagehash ≤ {n}": share(apart <= n) for n in (0, 4, 10)}}
    pairs = list(combinations(range(len(originals)), 2))
    apart = np.array([theirs[one] - theirs[two] for one, two in pairs])
    yield {
        "change": f"other pictures taken for copies, of {len(pairs)} pairs",
        "owl": sum(alike(ours[one], ours[two], settings) for one, two in pairs),
        **{f"imagehash ≤ {n}": int((apart <= n).sum()) for n in (0, 4, 10)},
    }


def share(found: Any) -> float:
    return round(100 * float(np.mean(found)), 1)


def read_pictures(raw: list[str], count: int) -> list[Image.Image]:
    found: list[Image.Image] = []
    for path in find_shards(raw):
        for sample in read_shard(path):
            if sample.images and sample.reason is None:
                found.append(Image.open(io.BytesIO(sample.images[0])).convert("RGB"))
            if len(found) == count:
                return found
    return found


def marks_of(image: Image.Image) -> Marks:
    phash, thumbnail, _ = fingerprints(image)
    return np.array([int(phash, 16)], dtype=np.uint64), np.frombuffer(thumbnail, np.uint8)[None]


def alike(one: Marks, two: Marks, settings: Deduplication) -> bool:
    """Whether two pictures meet, and are alike, as in a run."""
    if np.bitwise_count(one[0] ^ two[0])[0] > REACH:
        return False
    bits = {"phash": np.concatenate([one[0], two[0]])}
    keys = (picture_key(bits, settings, number) for number in range(len(choices(settings.radius))))
    return any(key[0] == key[1] for key in keys) and bool(alike_pictures(one[1], two[1], settings)[0])


# --- what it takes ---------------------------------------------------------------------------------------------------

SHARD = 10_000


def mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64: numbers that look random, from their places alone."""
    values = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))


@ray.remote(num_cpus=1)
def write_book(folder: str, number: int) -> None:
    """A ledger of SHARD made-up pictures: of twenty, the last is the equal of an earlier one, the one before it nearly
    so; in the first ledger nothing is copied."""
    places = np.arange(number * SHARD, (number + 1) * SHARD, dtype=np.uint64)
    kind = places % np.uint64(20)
    equal, near = (kind == 19) & (places >= SHARD), (kind == 18) & (places >= SHARD)
    earlier = mixed(places) % np.maximum(places // np.uint64(20), np.uint64(1)) * np.uint64(20)
    which = np.where(equal | near, earlier, places)
    phash = mixed(which + np.uint64(1 << 40)) ^ np.where(near, np.uint64(0b1001), np.uint64(0))
    sha = mixed(np.where(near, places, which) + np.uint64(1 << 41))
    books = pa.table(
        {
            "key": places.astype(str),
            "verdict": ["kept"] * SHARD,
            "sha256": [f"{value:016x}" * 4 for value in sha.tolist()],
            "phash": [f"{value:016x}" for value in phash.tolist()],
            "row": np.arange(SHARD, dtype=np.int32),
        }
    )
    columns = {name: books[name] if name in books.column_names else pa.nulls(SHARD) for name in LEDGER.names}
    ledger.write_ledger(folder, f"{number:06d}", pa.table(columns).cast(LEDGER))
    blocks = mixed(which[:, None] * np.uint64(48) + np.arange(48, dtype=np.uint64)).astype(np.uint8)
    pixels = blocks.reshape(-1, 4, 4, 3).repeat(4, axis=1).repeat(4, axis=2)
    table = pa.table({"thumbnail": [picture.tobytes() for picture in pixels]}, schema=THUMBNAILS)
    path = f"{folder}/thumbnails/{number:06d}.arrow"
    options = pa.ipc.IpcWriteOptions(compression="zstd")  # 38 GB otherwise, for 50 million
    with storage.open_write(path) as file, pa.ipc.new_file(file, table.schema, options=options) as writer:
        writer.write_table(table)
    ledger.write_marker(folder, f"{number:06d}", f"{number:06d}.tar", [None] * SHARD, SHARD, "")


def take_time(folder: str, rows: int) -> dict[str, Any]:
    """Makes ledgers of ``rows`` pictures in ``folder`` if they are not there, and finds their duplicates; "made" is how
    many there are of each kind."""
    shards = [f"{number:06d}" for number in range(rows // SHARD)]
    if len(storage.listing(f"{folder}/markers", ".json")) < len(shards):
        ray.get([write_book.remote(folder, number) for number in range(len(shards))])
    Path(folder).mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    entries = remove_duplicates(folder, shards, rows, Deduplication())
    dropped = ledger.total(entries)["dropped"]
    return {
        "rows": rows,
        "seconds": round(time.monotonic() - began, 1),
        "dropped": dropped,
        "made": (rows - SHARD) // 20,
    }
