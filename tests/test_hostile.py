"""Hostile input: mutated pictures, tars, JSON and Parquet, bombs, empty files, odd names. Every sample must come out
with a verdict and a known reason, in bounded time and memory. `python tests/test_hostile.py SECONDS [SEED]` goes on
mutating for as long as one likes.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import struct
import sys
import tarfile
import time
import zlib
from collections import Counter

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.curation.decode import Pictures, judge
from pipelines.curation.filters import REASONS, Limits
from pipelines.curation.sources import RawSample, UnreadableShard, read_shard

SLOWEST = 20.0
"""Seconds that no sample may take, on however busy a machine."""


def seeds() -> dict[str, bytes]:
    """A small picture of each format, some of them unusual."""
    noise = Image.effect_noise((160, 120), 70).convert("RGB")
    made = {}

    def add(name: str, image: Image.Image, kind: str, **options) -> None:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        made[name] = buffer.getvalue()

    exif = Image.Exif()
    exif[0x0112] = 6
    add("jpeg", noise, "JPEG", quality=80)
    add("progressive", noise, "JPEG", progressive=True, subsampling="4:4:4")
    add("turned", noise, "JPEG", exif=exif)
    add("grey", noise.convert("L"), "JPEG")
    add("cmyk", noise.convert("CMYK"), "JPEG")
    add("png", noise, "PNG")
    add("palette", noise.convert("P"), "PNG", transparency=3)
    add("alpha", noise.convert("RGBA"), "PNG")
    add("png16", Image.new("I;16", (100, 100), 40000), "PNG")
    add("gif", noise, "GIF", save_all=True, append_images=[noise.rotate(90), noise.rotate(180)])
    add("webp", noise, "WEBP", quality=60)
    add("webp_moving", noise, "WEBP", save_all=True, append_images=[noise.rotate(90)])
    add("tiff", noise, "TIFF", compression="tiff_lzw")
    add("bmp", noise, "BMP")
    return made


def bombs() -> dict[str, bytes]:
    """Files that declare far more than they hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(width: int, height: int) -> bytes:
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        pixels = zlib.compress(bytes(1 << 16), 9)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")

    jpeg = bytearray(seeds()["jpeg"])
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 65000, 65000)
    gif = bytearray(seeds()["gif"])
    gif[6:10] = struct.pack("<HH", 60000, 60000)
    return {
        "png": png(50_000, 50_000),
        "wide": png(2**31 - 1, 1),
        "jpeg": bytes(jpeg),
        "gif": bytes(gif),
        "ztxt": png(100, 100)[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(60 << 20))) + png(100, 100)[33:],
    }


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Bits flipped, runs cut, doubled, zeroed or replaced, numbers made large, the end lost."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        if not changed:
            break
        at, length = chance.randrange(len(changed)), chance.choice([1, 2, 4, 16, 64])
        match chance.randrange(7):
            case 0:
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = changed[at : at + length]
            case 3:
                changed[at : at + length] = bytes(len(changed[at : at + length]))
            case 4:
                changed[at : at + length] = chance.randbytes(length)
            case 5:
                changed[at : at + 4] = chance.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\xff\xff"])
            case 6:
                del changed[at:]
    return bytes(changed)


def judged(sample: RawSample, short_side: int | None = 64) -> str:
    began = time.monotonic()
    row = judge(sample, Limits(), Pictures(short_side=short_side), True)
    assert time.monotonic() - began < SLOWEST
    assert row["reason"] is None or row["reason"] in REASONS, row["reason"]
    if row["reason"] is None and row.get("image"):
        Image.open(io.BytesIO(row["image"])).load()
    return row["reason"] or "kept"


def attack_pictures(count: int, seed: int) -> Counter:
    chance, base = random.Random(seed), list(seeds().values())
    found: Counter = Counter()
    for number in range(count):
        data = mutated(chance.choice(base), chance)
        found[judged(RawSample(str(number), "s@0", [data], ["a dog runs"]), chance.choice([None, 64]))] += 1
    return found


def attack_shards(folder, count: int, seed: int) -> Counter:
    """Whole tars, JSONL and Parquet files, damaged anywhere; what can be read of them is judged."""
    chance, pictures = random.Random(seed), list(seeds().values())
    names = [
        "a.jpg",
        "../../etc/passwd.jpg",
        "/abs.png",
        "ü\udcff.jpg",
        "x" * 150 + ".jpg",
        ".jpg",
        "a b\n.jpg",
        "a/.b/c",
    ]
    found: Counter = Counter()
    for number in range(count):
        kind = chance.choice(["tar", "tar", "jsonl", "parquet"])
        path = folder / f"{number}.{kind}"
        buffer = io.BytesIO()
        if kind == "tar":
            with tarfile.open(
                fileobj=buffer, mode="w", format=chance.choice([0, 1, 2]), errors="surrogateescape"
            ) as tar:
                for _ in range(3):
                    name = chance.choice(names)
                    for ending, data in (("", chance.choice(pictures)), (".json", b'{"captions": ["a dog runs"]}')):
                        member = tarfile.TarInfo(name + ending)
                        member.size = len(data)
                        with contextlib.suppress(ValueError):  # a name that this tar format cannot hold
                            tar.addfile(member, io.BytesIO(data))
        elif kind == "jsonl":
            line = {"key": chance.choice([1, None, "k", [1]]), "caption": chance.choice(["a dog", 5, None, {"a": 1}])}
            line["image"] = chance.choice(["../no.jpg", 5, ["x"], None])
            line["conversations"] = chance.choice([None, [], [{"from": "x"}], "text", [{"from": "human", "value": 3}]])
            buffer.write("\n".join([json.dumps(line)] * 3).encode())
        else:
            pq.write_table(pa.table({"image": pictures[:3], "caption": ["a dog runs", "", None]}), buffer)
        path.write_bytes(mutated(buffer.getvalue(), chance) if chance.random() < 0.8 else buffer.getvalue())
        try:
            for sample in read_shard(str(path)):
                found[judged(sample)] += 1
        except UnreadableShard:
            found["unreadable"] += 1
        path.unlink()
    return found


def memory() -> int:
    return psutil.Process().memory_info().rss


@pytest.mark.parametrize("count", [400, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutated_pictures_all_get_a_verdict(count):
    before = memory()
    found = attack_pictures(count, seed=count)
    assert sum(found.values()) == count
    assert min(found["kept"], found["image_corrupt"], found["image_truncated"]) > 0
    assert memory() - before < 600 << 20


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_shards_are_read_as_far_as_they_go(tmp_path, count):
    before = memory()
    found = attack_shards(tmp_path, count, seed=count)
    assert min(found["kept"], found["shard_truncated"], found["unreadable"]) > 0
    assert memory() - before < 600 << 20


@pytest.mark.parametrize("name", bombs())
def test_bombs_are_never_decoded(name):
    before = memory()
    reason = judged(RawSample("k", "s@0", [bombs()[name]], ["a dog runs"]))
    assert reason in ("image_bomb", "image_corrupt", "image_truncated", "image_aspect")
    assert memory() - before < 100 << 20


def test_names_are_only_names(tmp_path):
    """A key with a path in it is a key; nothing is ever written under it."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("../../evil.jpg", "/etc/evil.jpg"):
            member = tarfile.TarInfo(name)
            tar.addfile(member, io.BytesIO(b""))
    assert [sample.key for sample in read_shard(str(tmp_path / "a.tar"))] == ["../../evil", "/etc/evil"]


if __name__ == "__main__":
    from pathlib import Path
    from tempfile import TemporaryDirectory

    until, seed = time.monotonic() + float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    total: Counter = Counter()
    with TemporaryDirectory() as folder:
        while time.monotonic() < until:
            total += attack_pictures(200, seed) + attack_shards(Path(folder), 50, seed)
            seed += 1
    print(f"{sum(total.values())} samples, {seed} seeds: {dict(total.most_common())}")
