"""Curation of real files: the ledger against what was planted, resume, and one sentence for what the user can mend."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image, ImageFilter

from jobs.recipes import load
from jobs.world.shards import PLANTED, World, write_world
from pipelines.curation import ledger
from pipelines.curation.curate import Watch, curate, curate_shards
from pipelines.curation.decode import Pictures, judge
from pipelines.curation.filters import (
    HeaderStats,
    Limits,
    caption_stats,
    is_blocked,
    judge_caption,
    judge_header,
    masked,
)
from pipelines.curation.options import Curation
from pipelines.curation.rethreshold import rethreshold
from pipelines.curation.sources import RawSample, find_shards, read_sample, read_shard
from pipelines.settings import OwlError

DRAWN = load("demo_small").curation
"""Settings for drawn scenes, where a shape that moved a little makes another picture."""


@pytest.fixture(scope="module")
def curated(cluster, world, tmp_path_factory):
    output = str(tmp_path_factory.mktemp("curated") / "pairs")
    return output, curate([f"{world}/raw/pairs"], output, DRAWN)


def ledger_rows(output: str) -> list[dict]:
    paths = sorted(os.scandir(f"{output}/ledger"), key=lambda entry: entry.name)
    return [row for path in paths for row in pq.read_table(path.path).to_pylist()]


def test_ledger_counts_equal_the_planted(curated):
    output, manifest = curated
    assert manifest["dropped"] == dict(sorted(PLANTED.items()))
    assert dict(Counter(row["reason"] for row in ledger_rows(output) if row["reason"])) == PLANTED


def test_every_shard_balances(curated, world):
    output, manifest = curated
    for entry in manifest["shards"]:
        assert entry["in"] == entry["kept"] + sum(entry["dropped"].values())
        assert entry["in"] == len(list(read_shard(entry["raw"])))
    assert manifest["in"] == len(ledger_rows(output))


def test_shards_open_with_plain_readers(curated):
    output, manifest = curated
    entry = manifest["shards"][0]
    path = f"{output}/shards/{entry['shard']}.arrow"
    with pa.memory_map(path) as source:
        assert pa.ipc.open_file(source).read_all().num_rows == entry["rows"] > 0
    assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == entry["sha256"]
    datasets = pytest.importorskip("datasets")
    assert len(datasets.load_dataset("arrow", data_files=path, split="train")) > 0


def test_a_second_run_changes_nothing(curated, world):
    output, manifest = curated
    before = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(f"{output}/shards")}
    assert curate([f"{world}/raw/pairs"], output, DRAWN) == manifest
    assert before == {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(f"{output}/shards")}


def test_other_settings_in_the_same_folder_are_refused_by_name(curated, world):
    with pytest.raises(OwlError, match=r"limits.min_words 2 → 3"):
        curate([f"{world}/raw/pairs"], curated[0], DRAWN.model_copy(update={"limits": Limits(min_words=3)}))


def test_a_file_that_is_no_shard_is_named_after_the_others_are_done(cluster, world, tmp_path):
    good = next((world / "raw/pairs").glob("*.tar"))
    (tmp_path / "good.tar").write_bytes(good.read_bytes())
    (tmp_path / "bad.tar").write_bytes(b"this is no tar" * 100)
    with pytest.raises(OwlError, match=r"1 of 2 raw shards could not be used: .*bad\.tar cannot be read"):
        curate([f"{tmp_path}/*.tar"], f"{tmp_path}/out", Curation())
    assert len(os.listdir(f"{tmp_path}/out/markers")) == 1


def test_a_sample_is_found_again_by_its_source(world):
    path = find_shards([f"{world}/raw/pairs"])[0]
    samples = list(read_shard(path))
    again = read_sample(path, samples[5].source)
    assert (again.key, again.images, again.captions) == (samples[5].key, samples[5].images, samples[5].captions)


def test_sources_of_every_layout_give_the_same_samples(world, tmp_path):
    samples = [s for s in read_shard(find_shards([f"{world}/raw/pairs"])[0]) if s.reason is None][:4]
    table = pa.table({"key": [s.key for s in samples], "image": [s.images[0] for s in samples]})
    pq.write_table(table.append_column("caption", pa.array([s.captions for s in samples])), tmp_path / "a.parquet")
    with open(tmp_path / "b.jsonl", "w") as file:
        for s in samples:
            (tmp_path / f"{s.key}.jpg").write_bytes(s.images[0])
            file.write(json.dumps({"key": s.key, "image": f"{s.key}.jpg", "captions": s.captions}) + "\n")
    wanted = [(s.key, s.images, s.captions) for s in samples]
    for name in ("a.parquet", "b.jsonl"):
        assert [(s.key, s.images, s.captions) for s in read_shard(f"{tmp_path}/{name}")] == wanted


def test_braces_and_globs(tmp_path):
    for name in ("x-0.tar", "x-1.tar", "y-0.tar"):
        (tmp_path / name).touch()
    assert [p[-7:] for p in find_shards([f"{tmp_path}/{{x,y}}-0.tar"])] == ["x-0.tar", "y-0.tar"]
    with pytest.raises(OwlError, match="no raw shards at"):
        find_shards([f"{tmp_path}/z-*.tar"])


@pytest.mark.parametrize(
    ("caption", "limits", "reason"),
    [
        ("a red circle", {}, None),
        ("  \n", {}, "caption_empty"),
        ("IMG_2041.jpg", {}, "caption_junk"),
        ("### $$$ !!!", {}, "caption_junk"),
        ("buy buy buy buy buy", {}, "caption_junk"),
        ("circle", {}, "caption_short"),
        ("one two three four", {"max_words": 3}, "caption_long"),
        ("one two three four", {"max_characters": 10}, "caption_long"),
        ("SALE OF SHOES today", {"max_capitals": 0.6}, "caption_capitals"),
        ("xk72b9 dfgh wrtz of a dog", {"max_non_words": 0.4}, "caption_non_words"),
        ("see www.shop.com for a dog", {"contacts": "drop"}, "caption_contact"),
        ("write to me@shop.org for a dog", {"contacts": "drop"}, "caption_contact"),
        ("call +49 30 1234 5678 for a dog", {"contacts": "drop"}, "caption_contact"),
        ("call +49 30 1234 5678 for a dog", {"contacts": "mask"}, None),
        ("a dog in 2024, 3.5 m from a cat.", {"contacts": "drop"}, None),
        ("Stock Photo of a dog", {"boilerplate": ["stock photo"]}, "caption_boilerplate"),
        ("собака на улице рядом с домом", {"max_non_words": 0.0}, None),
    ],
)
def test_captions(caption, limits, reason):
    assert judge_caption(caption, caption_stats(caption), Limits(**limits)) == reason


def test_contacts_are_masked():
    text = "mail me@shop.org or see https://shop.com/a?b=1 or call 030 1234 5678 now"
    assert masked(text) == "mail [e-mail] or see [url] or call [phone] now"


@pytest.mark.parametrize(
    ("caption", "language"),
    [
        ("a small dog is running across the street", "en"),
        ("ein kleiner Hund läuft über die Straße", "de"),
        ("un petit chien court dans la rue", "fr"),
        ("маленькая собака бежит по улице", "ru"),
        ("一只小狗在街上奔跑", "zh"),
    ],
)
def test_languages(caption, language):
    pytest.importorskip("pycld2")
    stats = caption_stats(caption, languages=True)
    assert stats.language == language
    assert judge_caption(caption, stats, Limits(languages=[language])) is None
    assert judge_caption(caption, stats, Limits(languages=["ja"])) == "caption_language"


@pytest.mark.parametrize(
    ("size", "limits", "reason"),
    [
        ((64, 64), {}, None),
        ((63, 200), {}, "image_small"),
        ((80, 241), {}, "image_aspect"),
        ((80, 80), {"min_bytes": 6000}, "image_light"),
    ],
)
def test_headers(size, limits, reason):
    assert judge_header(HeaderStats(5000, *size, False), Limits(**limits)) == reason


def test_moving_flat_and_blurred_pictures():
    def judged_as(image: Image.Image, limits: dict, **options) -> str | None:
        buffer = io.BytesIO()
        image.save(buffer, options.pop("kind", "PNG"), **options)
        return judge(RawSample("k", "s@0", [buffer.getvalue()], ["a dog runs"]), Limits(**limits), Pictures(), True)[
            "reason"
        ]

    noise = Image.effect_noise((200, 200), 80).convert("RGB")
    assert judged_as(noise, {"min_entropy": 3, "min_sharpness": 50}) is None
    assert judged_as(Image.new("RGB", (200, 200), "red"), {"min_entropy": 1}) == "image_flat"
    assert judged_as(noise.filter(ImageFilter.GaussianBlur(4)), {"min_sharpness": 50}) == "image_blurred"
    frames = {"kind": "GIF", "save_all": True, "append_images": [Image.new("RGB", (200, 200), "blue")]}
    assert judged_as(noise, {"animated": False}, **frames) == "image_animated"
    assert judged_as(noise, {}, **frames) is None


@pytest.mark.slow
def test_killed_and_run_again_equals_undisturbed(world, tmp_path):
    """kill -9 of the driver while shards are being written; the rerun gives the same dataset."""
    for part in ("pairs",):
        write_world(tmp_path / "world", World(pairs=600, shards=12, seed=3), part)
    command = [sys.executable, "-m", "jobs.cli", "curate", f"{tmp_path}/world/raw/pairs", "--out"]
    killed = subprocess.Popen([*command, f"{tmp_path}/killed"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    markers = tmp_path / "killed/markers"
    deadline = time.time() + 90
    while time.time() < deadline and not (markers.exists() and any(markers.iterdir())):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = len(list(markers.glob("*.json")))
    for name in ("killed", "calm"):
        subprocess.run([*command, f"{tmp_path}/{name}"], check=True, capture_output=True, timeout=120)
    assert done > 0
    for folder in ("shards", "ledger"):
        for entry in os.scandir(tmp_path / "calm" / folder):
            other = tmp_path / "killed" / folder / entry.name
            if folder == "shards":
                assert other.read_bytes() == Path(entry.path).read_bytes()
            else:
                assert pq.read_table(other).equals(pq.read_table(entry.path))
    assert not list((tmp_path / "killed").rglob("*.partial"))


def tar_of(path: Path, samples: list[tuple[str, bytes, str]], **fields) -> None:
    with tarfile.open(path, "w") as tar:
        for key, data, caption in samples:
            described = json.dumps({"caption": caption, **fields}).encode()
            for name, content in ((f"{key}.jpg", data), (f"{key}.json", described)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def noise(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def test_blocklists_hold_domains_and_hashes(cluster, tmp_path):
    tar_of(tmp_path / "a.tar", [("1", noise(1), "a dog runs")], url="https://img.Bad.example/1.jpg")
    tar_of(tmp_path / "b.tar", [("2", noise(2), "a dog runs"), ("3", noise(3), "a dog")], url="https://notbad.example")
    (tmp_path / "list.txt").write_text(f"bad.example\n{hashlib.sha256(noise(2)).hexdigest()}\n")
    limits = Limits(blocklists=[f"{tmp_path}/list.txt"])
    manifest = curate([f"{tmp_path}/*.tar"], f"{tmp_path}/out", Curation(limits=limits))
    assert {row["key"]: row["reason"] for row in ledger_rows(f"{tmp_path}/out")} == {
        "1": "blocked",
        "2": "blocked",
        "3": None,
    }
    assert manifest["dropped"] == {"blocked": 2}
    assert rethreshold(f"{tmp_path}/out", Limits())["kept"] == 3
    (tmp_path / "bad.txt").write_text("not a domain!\n")
    with pytest.raises(OwlError, match="neither a domain nor a sha256"):
        is_blocked("https://x.org", (), Limits(blocklists=[f"{tmp_path}/bad.txt"]))


def test_a_shard_that_kills_its_worker_is_set_aside(cluster, tmp_path):
    """The picture's decoder ends the process, as a crash in a C library would; the other shards are done."""
    for number in range(6):
        tar_of(tmp_path / f"{number}.tar", [(f"{number}", noise(number), "a dog runs")])
    poison = f"{tmp_path}/3.tar"
    shards = {f"s{n}": f"{tmp_path}/{n}.tar" for n in range(6)}
    watch = Watch.remote(f"{tmp_path}/out", 0, Curation(max_error_rate=0.2, max_tries=3))
    work = pa.table({"shard": list(shards), "path": list(shards.values())})

    @ray.remote(num_cpus=1, max_retries=-1)
    def one_task():
        def write(output, shard, raw, rows):
            if raw == poison:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(output, shard, raw, rows)

        real = ledger.write_shard
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ledger, "write_shard", write)
            return curate_shards(work, f"{tmp_path}/out", Curation(), watch).to_pylist()

    aside = ray.get(one_task.remote(), timeout=120)
    assert aside == [{"shard": "s3", "why": f"raw shard {poison} took its worker down 3 times"}]
    assert ledger.finished(f"{tmp_path}/out") == set(shards) - {"s3"}
    assert ray.get(watch.read.remote())[0] == 5


def test_unreadable_shards_may_be_allowed(cluster, tmp_path):
    tar_of(tmp_path / "good.tar", [("1", noise(1), "a dog runs")])
    (tmp_path / "bad.tar").write_bytes(b"this is no tar" * 100)
    manifest = curate([f"{tmp_path}/*.tar"], f"{tmp_path}/out", Curation(max_set_aside=1))
    assert manifest["kept"] == 1
    assert [why for why in manifest["set_aside"].values() if "bad.tar cannot be read" in why]


def test_a_damaged_input_stops_early(cluster, tmp_path):
    for number in range(40):
        samples = [(f"{number}-{n}", b"<html>", "a dog runs") for n in range(100)]
        tar_of(tmp_path / f"{number:02d}.tar", samples)
    with pytest.raises(OwlError, match=r"of .* samples are damaged, more than max_error_rate 0.2 allows"):
        curate([f"{tmp_path}/*.tar"], f"{tmp_path}/out", Curation())
    assert 10 <= len(os.listdir(f"{tmp_path}/out/markers")) < 40
