"""What curation costs beside other ways to do the same work: read tars of JPEGs, drop the unfit, store at 224 px.

Every way runs as a process of its own, with all it starts; CPU seconds and memory are summed over that tree. Two sizes
of input are measured, and the steady cost of a picture is the difference: what a job of any size starts with (Ray's
processes, imports) is told apart, not hidden.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import psutil
import pyarrow as pa

from jobs.bench_curation_set import write_set, write_tiny
from pipelines.curation.filters import (
    Limits,
    caption_stats,
    contact_in,
    is_no_word,
    judge_caption,
    language_of,
    masked,
)
from pipelines.curation.likeness import caption_marks, near_caption_marks
from pipelines.curation.sources import find_shards, read_shard
from pipelines.settings import OwlError

SAME = ["--set", "deduplication=null", "--set", "pictures.short_side=224", "--set", "limits.min_side=128"]
SAME += ["--set", "limits.min_words=3"]

RIVALS = Path(__file__).parents[1] / ".rivals"
SCRIPTS = Path(__file__).with_name("rivals")


class Way(NamedTuple):
    """Arguments of a Python, to which the raw folder and `--out FOLDER` are added."""

    arguments: list[str]
    environment: str | None = None
    """Folder in RIVALS with the environment whose Python it is; None for Owl's own."""


WAYS: dict[str, Way] = {
    "bare loop": Way(["-m", "jobs.bench_rivals", "bare"]),
    "owl, same work": Way(["-m", "jobs.cli", "curate", *SAME]),
    "owl, hashes and statistics": Way(["-m", "jobs.cli", "curate", *SAME, "--set", "limits.min_entropy=0.001"]),
    "owl, default": Way(["-m", "jobs.cli", "curate", "--set", "pictures.short_side=224"]),
    "ray data": Way(["-m", "jobs.bench_rivals", "ray_data"]),
    "webdataset": Way(["-m", "jobs.bench_rivals", "webdataset"]),
    "img2dataset": Way([f"{SCRIPTS}/with_img2dataset.py"], "img2dataset"),
    "daft": Way([f"{SCRIPTS}/with_daft.py"], "daft"),
    "data-juicer": Way([f"{SCRIPTS}/with_data_juicer.py"], "data_juicer"),
}


class Cost(NamedTuple):
    seconds: float
    cpu: float
    excluded: float
    memory: int


def command_of(name: str) -> list[str]:
    """The command of a way, but for the folders. Raises OwlError, with what makes it, if its environment is missing."""
    way = WAYS[name]
    python = RIVALS / way.environment / "bin" / "python" if way.environment else Path(sys.executable)
    if not python.exists():
        raise OwlError(f"no environment for {name} at {python.parents[1]}; make rivals sets it up")
    return [str(python), *way.arguments]


def run(command: list[str]) -> Cost:
    """Wall seconds, CPU seconds and peak resident bytes of a process and all that it started. CPU seconds that it
    names in its last line of output, {"excluded_cpu_s": …}, are told apart. Raises OwlError with what it said, if it
    failed."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    printed: list[str] = []
    said: list[str] = []
    pipes = ((printed, process.stdout), (said, process.stderr))
    readers = [threading.Thread(target=lines.extend, args=(pipe,), daemon=True) for lines, pipe in pipes]
    for reader in readers:
        reader.start()
    used: dict[tuple[int, float], float] = {}
    peak = 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, look(root, used))
        time.sleep(0.05)
    seconds = time.monotonic() - began
    for reader in readers:
        reader.join()
    if process.returncode:
        raise OwlError(f"{' '.join(command)} failed: {''.join(said[-5:])}")
    last = printed[-1] if printed else ""
    excluded = json.loads(last)["excluded_cpu_s"] if last.startswith('{"excluded_cpu_s"') else 0.0
    return Cost(seconds, sum(used.values()) - excluded, excluded, peak)


def look(root: psutil.Process, used: dict[tuple[int, float], float]) -> int:
    """Notes the CPU seconds of every process under ``root``; returns their resident bytes, shared pages once."""
    memory = 0
    try:
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in family:
        try:
            with process.oneshot():
                times = process.cpu_times()
                used[process.pid, process.create_time()] = times.user + times.system
                info = process.memory_info()
                memory += info.rss - info.shared
        except psutil.NoSuchProcess:
            continue
    return memory


def measure(folder: str, ways: list[str], sizes: tuple[int, int], repeats: int) -> Iterator[dict[str, Any]]:
    """Medians over ``repeats`` turns: {"way", "cpu_ms_a_picture", "start_cpu_s", "pictures_a_second", "peak_mb", …}.
    Raises OwlError if the environment of a way is missing, before any is measured."""
    commands = {way: command_of(way) for way in ways}
    raw = {size: f"{folder}/web-{size}" for size in sizes}
    for size in sizes:
        if not Path(raw[size]).exists():
            write_set(raw[size], size)
    small, large = sizes
    costs: dict[tuple[str, int], list[Cost]] = {}
    for _ in range(repeats):
        for way in ways:
            for size in sizes:
                with TemporaryDirectory(dir=folder) as out:
                    cost = run([*commands[way], raw[size], "--out", f"{out}/out"])
                costs.setdefault((way, size), []).append(cost)
    for way in ways:
        first, second = costs[way, small], costs[way, large]
        cpu = statistics.median(b.cpu - a.cpu for a, b in zip(first, second, strict=True)) / (large - small)
        wall = statistics.median(b.seconds - a.seconds for a, b in zip(first, second, strict=True)) / (large - small)
        yield {
            "way": way,
            "cpu_ms_a_picture": round(1e3 * cpu, 3),
            "pictures_a_second": round(1 / wall, 1),
            "start_cpu_s": round(statistics.median(cost.cpu for cost in first) - cpu * small, 1),
            "cpu_s": [round(statistics.median(cost.cpu for cost in each), 1) for each in (first, second)],
            "excluded_cpu_s": [round(statistics.median(cost.excluded for cost in each), 1) for each in (first, second)],
            "wall_s": [round(statistics.median(cost.seconds for cost in each), 1) for each in (first, second)],
            "peak_mb": round(max(cost.memory for cost in second) / 2**20),
        }


def measure_shards(folder: str, counts: list[int]) -> Iterator[dict[str, Any]]:
    """A default run over many tiny shards: {"shards", "wall_s", "cpu_s", "peak_mb"} for each count."""
    for count in counts:
        write_tiny(f"{folder}/tiny-{count}", count)
        with TemporaryDirectory(dir=folder) as out:
            small = ["--set", "limits.min_side=32"]
            cost = run([*command_of("owl, default"), *small, f"{folder}/tiny-{count}", "--out", f"{out}/out"])
        yield {
            "shards": count,
            "wall_s": round(cost.seconds, 1),
            "cpu_s": round(cost.cpu, 1),
            "peak_mb": round(cost.memory / 2**20),
        }


def measure_captions(raw: list[str], count: int, repeats: int) -> dict[str, float]:
    """Microseconds a caption of what captions are put through: medians over ``repeats`` passes of ``count``."""
    captions = [text for path in find_shards(raw) for sample in read_shard(path) for text in sample.captions][:count]
    table = pa.table({"captions": [[caption] for caption in captions]})
    stats = [caption_stats(caption) for caption in captions]
    limits = Limits(boilerplate=["stock photo", "click here", "for sale"])
    passes: dict[str, Callable[[], Any]] = {
        "statistics": lambda: [caption_stats(caption) for caption in captions],
        "non-words (of the statistics)": lambda: [sum(map(is_no_word, caption.split())) for caption in captions],
        "contacts (of the statistics)": lambda: [contact_in(caption) for caption in captions],
        "all rules": lambda: [judge_caption(c, s, limits) for c, s in zip(captions, stats, strict=True)],
        "language": lambda: [language_of(caption) for caption in captions],
        "masking": lambda: [masked(caption) for caption in captions],
        "key for equal captions": lambda: caption_marks(table),
        "MinHash for near captions": lambda: near_caption_marks(table),
    }
    costs = {}
    for name, go in passes.items():
        seconds = []
        for _ in range(repeats):
            began = time.process_time()
            go()
            seconds.append(time.process_time() - began)
        costs[name] = round(1e6 * statistics.median(seconds) / len(captions), 2)
    return costs
