"""Raw image-caption shards → a curated Arrow dataset, on Ray Data.

A raw shard is the unit of work and of resume. One task reads it sample by sample, judges each, writes the fit ones as
Arrow while it goes, every one into the ledger, and a marker last; so no picture ever passes between tasks, and a rerun
takes the work list minus the markers. What Ray Data moves are the shards' names. Scores, duplicates and thresholds that
move are later verdicts (`verdicts.py`).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from operator import itemgetter

import pyarrow as pa
import ray
import ray.data

from pipelines import storage
from pipelines.curation import ledger
from pipelines.curation.decode import judge
from pipelines.curation.dedup import LATER
from pipelines.curation.meters import Meters
from pipelines.curation.options import Curation
from pipelines.curation.report import write_report
from pipelines.curation.scoring import refuse_missing, score
from pipelines.curation.sources import UnreadableShard, find_shards, read_shard
from pipelines.curation.verdicts import settle
from pipelines.curation.versions import Lock, current, publish, writing
from pipelines.progress import progress
from pipelines.settings import OwlError, refuse_other_settings

log = logging.getLogger(__name__)


def curate(raw: list[str], output: str, settings: Curation) -> dict:
    """Curates the raw shards that ``raw`` names into the folder ``output``; returns the manifest.

    What the last version holds stays as it is, and so do raw shards that were withdrawn from it; where there is
    anything new, it is compared with all of it, and makes the next version. Shards finished by a run that was
    interrupted are not touched again. Raises OwlError where the folder was made with other settings, where another run
    is writing it, where more shards than allowed cannot be used (after finishing all others), or where too much of the
    input is damaged."""
    refuse_missing(settings.scoring)
    shards = {ledger.shard_id(path): path for path in find_shards(raw)}
    with writing(output) as lock:
        refuse_other_settings(output, settings)
        return take_in(shards, output, settings, lock)


def take_in(shards: dict[str, str], output: str, settings: Curation, lock: Lock) -> dict:
    began = time.monotonic()
    last = current(output) or {"shards": [], "withdrawn": []}
    settled = {entry["shard"]: entry["kept"] for entry in last["shards"]}
    new = {shard: shards[shard] for shard in sorted(shards.keys() - {*settled, *last["withdrawn"]})}
    if not new and settled:
        return last
    done = ledger.finished(output)
    todo = {shard: path for shard, path in new.items() if shard not in done}
    watch = Watch.remote(output, len(new) - len(todo), settings)  # type: ignore[attr-defined]
    aside = judge_and_write(todo, len(new), output, settings, watch) if todo else {}
    if len(aside) > settings.max_set_aside:
        raise OwlError(f"{len(aside)} of {len(new)} raw shards could not be used: {next(iter(aside.values()))}")
    good = sorted(new.keys() - aside.keys())
    if settings.scoring.wanted:
        score(output, good, settings.scoring)
    entries = settle(output, good, settings, settled)
    ray.get(watch.decided.remote(ledger.total(entries)))
    run = {
        "seconds": round(time.monotonic() - began, 1),
        "samples": sum(entry["in"] for entry in entries if entry["shard"] in todo),
        "cpus": ray.cluster_resources().get("CPU", 0),
    }
    facts = {"run": run, "set_aside": aside, "withdrawn": last["withdrawn"]}
    entries = sorted([*last["shards"], *entries], key=itemgetter("shard"))
    return write_manifest(output, settings, entries, facts, "curate", lock)


def write_manifest(output: str, settings: Curation, entries: list[dict], facts: dict, by: str, lock: Lock) -> dict:
    """Checks the books and closes them: report, then the version's manifest, which also holds ``facts`` and the verb
    that it is ``by``. Raises OwlError where too much of the input is damaged."""
    ledger.check_books(entries)
    counted = ledger.total(entries)
    refuse_damage(counted, settings.max_error_rate)
    manifest = {
        "settings": settings.model_dump(),
        "versions": {name: version(name) for name in ("owl-vlm", "ray", "pyarrow", "pillow")},
        **counted,
        **facts,
        "shards": entries,
    }
    storage.sweep(output)
    write_report(f"{output}/report.html", output, manifest)
    return publish(output, manifest, by, lock)


def judge_and_write(
    todo: dict[str, str], total: int, output: str, settings: Curation, watch: ray.actor.ActorHandle
) -> dict[str, str]:
    """Runs the Ray Data job over the raw shards in ``todo``; returns those that could not be used, and why. Raises
    OwlError where it was stopped by too much damage."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts shards and samples
    work = [{"shard": shard, "path": path} for shard, path in todo.items()]
    tasks = min(len(work), TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1))))
    with progress("curate", total, "shards", counter=watch):
        given = {"output": output, "settings": settings, "watch": watch}
        written = ray.data.from_items(work, override_num_blocks=tasks).map_batches(
            curate_shards, batch_size=None, batch_format="pyarrow", fn_kwargs=given
        )
        aside = {row["shard"]: row["why"] for row in written.iter_rows() if row["why"] is not None}
        refuse_damage(ray.get(watch.seen.remote()), settings.max_error_rate)
        return aside


TASKS_PER_CPU = 64
"""Raw shards are spread over this many tasks for each CPU: enough to share the work evenly, few enough that tiny
shards do not spend their time in scheduling."""
SOON = 1000
"""Samples from which the share of damaged ones is looked at."""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Watch:
    """Knows which shards were begun how often, and what came of all: so a shard that kills whoever opens it is set
    aside, and a job whose input is damaged stops early. One small message a shard."""

    def __init__(self, output: str, done: int, settings: Curation):
        self.done, self.max_error_rate, self.max_tries = done, settings.max_error_rate, settings.max_tries
        self.text = ""
        self.begun: Counter = Counter()
        self.total: dict = {"in": 0, "kept": 0, "dropped": {}}
        self.meters = Meters(output)

    def begin(self, shard: str, finished: tuple[dict, int] | None) -> str:
        """What a worker shall do with its next shard, when it is through with another: "go on", "set aside", "stop"."""
        if finished:
            self.end(*finished)
        if self.total["in"] >= SOON and damaged(self.total) > self.max_error_rate * self.total["in"]:
            return "stop"
        self.begun[shard] += 1
        return "go on" if self.begun[shard] <= self.max_tries else "set aside"

    def end(self, marker: dict, size: int) -> None:
        self.begun.pop(marker["shard"], None)
        self.meters.judged(marker, size)
        self.done += 1
        self.text = f"{marker['kept']} of {marker['in']} kept in {marker['shard']}"
        self.total = ledger.total([self.total, marker])

    def read(self) -> tuple[int, str]:
        return self.done, self.text

    def seen(self) -> dict:
        return self.total

    def decided(self, counted: dict) -> None:
        """What later verdicts dropped of what was fit."""
        self.meters.decided({name: counted["dropped"][name] for name in LATER if name in counted["dropped"]})


def curate_shards(work: pa.Table, output: str, settings: Curation, watch: ray.actor.ActorHandle) -> pa.Table:
    """Curates some raw shards, one after another; those with a marker were done by an earlier try of this task."""
    aside: list[dict] = []
    finished = None
    for item in work.to_pylist():
        shard = item["shard"]
        if storage.exists(f"{output}/markers/{shard}.json"):
            continue
        order = ray.get(watch.begin.remote(shard, finished))
        finished = None
        if order == "stop":
            break
        if order == "set aside":
            why = f"raw shard {item['path']} took its worker down {settings.max_tries} times"
            aside.append({"shard": shard, "why": why})
            continue
        try:
            marker = ledger.write_shard(output, shard, item["path"], judged(item["path"], settings))
            finished = marker, storage.size(item["path"])
            told = {name: marker[name] for name in ("shard", "in", "kept", "dropped")}
            log.info("curated a raw shard", extra={"output": output, **told})
        except UnreadableShard as error:
            aside.append({"shard": shard, "why": str(error)})
            log.error("a raw shard could not be read", extra={"output": output, "shard": shard, "why": str(error)})
    if finished:
        ray.get(watch.end.remote(*finished))
    return pa.Table.from_pylist(aside, schema=pa.schema([("shard", pa.string()), ("why", pa.string())]))


def judged(path: str, rules: Curation) -> Iterator[dict]:
    """Every sample of a raw shard with its verdict and statistics. Raises UnreadableShard where there is none."""
    marked = rules.deduplication is not None
    empty = True
    for sample in read_shard(path):
        empty = False
        yield judge(sample, rules.limits, rules.pictures, marked)
    if empty:
        raise UnreadableShard(f"raw shard {path} holds no sample")


DAMAGE = ("image_corrupt", "image_truncated", "json_malformed", "messages_malformed", "image_missing")


def damaged(counted: dict) -> int:
    return sum(counted["dropped"].get(reason, 0) for reason in DAMAGE)


def refuse_damage(counted: dict, most: float) -> None:
    if damaged(counted) > most * counted["in"]:
        raise OwlError(
            f"{damaged(counted)} of {counted['in']} samples are damaged, more than max_error_rate {most:g} allows: "
            f"{ {reason: counted['dropped'][reason] for reason in DAMAGE if reason in counted['dropped']} }"
        )
