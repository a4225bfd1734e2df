"""Raw image-caption shards → a curated Arrow dataset, on Ray Data.

A raw shard is the unit of work and of resume. One task reads it sample by sample, judges each, writes the fit ones as
Arrow while it goes, every one into the ledger, and a marker last; so no picture ever passes between tasks, and a rerun
takes the work list minus the markers. What Ray Data moves are the shards' names, and what became of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from importlib.metadata import version

import pyarrow as pa
import ray
import ray.data

from pipelines import storage
from pipelines.curation import ledger
from pipelines.curation.decode import Pictures, judge
from pipelines.curation.dedup import Deduplication, find_duplicates
from pipelines.curation.filters import Limits
from pipelines.curation.report import write_report
from pipelines.curation.sources import UnreadableShard, find_shards, read_shard
from pipelines.progress import progress
from pipelines.settings import OwlError, Settings, differences

log = logging.getLogger(__name__)


class Curation(Settings):
    """What a curated dataset is made of and held to."""

    limits: Limits = Limits()
    """Thresholds of the caption and picture filters."""
    pictures: Pictures = Pictures()
    """What is stored of a picture."""
    deduplication: Deduplication | None = Deduplication()
    """How duplicates are found; None keeps them."""
    max_error_rate: float = 0.2
    """The job stops without a manifest if more than this share of all samples is undecodable or malformed."""


def curate(raw: list[str], output: str, settings: Curation) -> dict:
    """Curates the raw shards that ``raw`` names into the folder ``output``; returns the manifest.

    Shards finished by an earlier run are not touched again. Raises OwlError where the folder was made with other
    settings, where a shard is unreadable (after finishing all others), or where too much of the input is damaged.
    """
    began = time.monotonic()
    shards = {ledger.shard_id(path): path for path in find_shards(raw)}
    refuse_other_settings(output, settings)
    todo = {shard: path for shard, path in shards.items() if shard not in ledger.finished(output)}
    if todo:
        unreadable = judge_and_write(todo, len(shards), output, settings)
        if unreadable:
            raise OwlError(f"{len(unreadable)} of {len(shards)} raw shards could not be used: {unreadable[0]}")
    manifest_path = f"{output}/manifest.json"
    if not todo and storage.exists(manifest_path):
        manifest = storage.read_json(manifest_path)
        if [entry["shard"] for entry in manifest["shards"]] == sorted(shards):
            return manifest
    entries = settle_duplicates(output, sorted(shards), settings)
    ledger.check_books(entries)
    counted = ledger.total(entries)
    refuse_damage(counted, settings.max_error_rate)
    manifest = {
        "settings": settings.model_dump(),
        "versions": {name: version(name) for name in ("owl-vlm", "ray", "pyarrow", "pillow")},
        "seconds": round(time.monotonic() - began, 1),
        **counted,
        "shards": entries,
    }
    write_report(f"{output}/report.html", output, manifest)
    storage.write_json(manifest_path, manifest)
    return manifest


def judge_and_write(todo: dict[str, str], total: int, output: str, settings: Curation) -> list[str]:
    """Runs the Ray Data job over the raw shards in ``todo``; returns what is wrong with those that are unreadable."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts shards and samples
    work = [{"shard": shard, "path": path} for shard, path in todo.items()]
    tasks = min(len(work), TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1))))
    with progress("curate", total, "shards", done=total - len(todo)) as counter:
        given = {"output": output, "settings": settings.model_dump(), "counter": counter}
        written = ray.data.from_items(work, override_num_blocks=tasks).map_batches(
            curate_shards, batch_size=None, batch_format="pyarrow", fn_kwargs=given
        )
        return [row["unreadable"] for row in written.iter_rows() if row["unreadable"] is not None]


TASKS_PER_CPU = 64
"""Raw shards are spread over this many tasks for each CPU: enough to share the work evenly, few enough that tiny
shards do not spend their time in scheduling."""


def curate_shards(work: pa.Table, output: str, settings: dict, counter: ray.actor.ActorHandle) -> pa.Table:
    """Curates some raw shards, one after another; those with a marker were done by an earlier try of this task."""
    rules = Curation(**settings)
    unreadable: list[str | None] = []
    for item in work.to_pylist():
        shard = item["shard"]
        if storage.exists(f"{output}/markers/{shard}.json"):
            continue
        try:
            marker = ledger.write_shard(output, shard, item["path"], judged(item["path"], rules))
        except UnreadableShard as error:
            unreadable.append(str(error))
            continue
        counter.advance.remote(1, f"{marker['kept']} of {marker['in']} kept in {shard}")
    return pa.table({"unreadable": pa.array(unreadable, pa.string())})


def judged(path: str, rules: Curation) -> Iterator[dict]:
    """Every sample of a raw shard with its verdict and statistics. Raises UnreadableShard where there is none."""
    marked = rules.deduplication is not None
    empty = True
    for sample in read_shard(path):
        empty = False
        yield judge(sample, rules.limits, rules.pictures, marked)
    if empty:
        raise UnreadableShard(f"raw shard {path} holds no sample")


def settle_duplicates(output: str, shards: list[str], settings: Curation) -> list[dict]:
    """Decides on duplicates and enters the decisions; returns one entry of the books for each shard."""
    markers = {shard: storage.read_json(f"{output}/markers/{shard}.json") for shard in shards}
    if settings.deduplication is None:
        return list(markers.values())
    pictures = sum(marker["kept"] for marker in markers.values())
    blocks = max(1, pictures // 200_000)
    duplicates = find_duplicates(output, shards, settings.deduplication, blocks)
    return ray.get([enter_duplicates.remote(output, shard, duplicates[shard]) for shard in shards])


@ray.remote(num_cpus=0.5)
def enter_duplicates(output: str, shard: str, duplicates: list[dict]) -> dict:
    decided = [{**item, "detail": f"kept instead: {item['kept_instead']}"} for item in duplicates]
    return ledger.deselect(output, shard, decided, instead_of=("duplicate_exact", "duplicate_near"))


def refuse_other_settings(output: str, settings: Curation) -> None:
    """A folder holds the results of one set of settings."""
    path = f"{output}/settings.json"
    if storage.exists(path):
        before = storage.read_json(path)
        if changed := differences(flat(before), flat(settings.model_dump())):
            raise OwlError(f"{output} was curated with other settings ({changed}); choose another folder")
    storage.write_json(path, settings.model_dump())


def flat(settings: dict, prefix: str = "") -> dict:
    """{"limits": {"min_words": 2}} → {"limits.min_words": 2}"""
    out: dict = {}
    for name, value in settings.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


DAMAGE = ("image_corrupt", "image_truncated", "json_malformed", "messages_malformed", "image_missing")


def refuse_damage(counted: dict, most: float) -> None:
    damaged = sum(counted["dropped"].get(reason, 0) for reason in DAMAGE)
    if damaged > most * counted["in"]:
        raise OwlError(
            f"{damaged} of {counted['in']} samples are damaged, more than max_error_rate {most:g} allows: "
            f"{ {reason: counted['dropped'][reason] for reason in DAMAGE if reason in counted['dropped']} }"
        )
