"""Raw image-caption shards → a curated Arrow dataset, on Ray Data.

A raw shard is the unit of work and of resume: one row = one block = one shard, all the way to the sink. Stages mark
rows and never drop them; the sink writes the fit rows as Arrow, every row into the ledger, and a marker last. A
rerun takes the work list minus the markers. Pictures never pass between tasks: reading, judging and writing of a
shard are fused into one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import version

import pyarrow as pa
import ray
import ray.data
from ray.data import Datasink

from pipelines import storage
from pipelines.curation import ledger
from pipelines.curation.decode import judge
from pipelines.curation.dedup import Deduplication, find_duplicates
from pipelines.curation.filters import Limits
from pipelines.curation.report import write_report
from pipelines.curation.sources import RawSample, UnreadableShard, find_shards, read_shard
from pipelines.progress import progress
from pipelines.records import CURATED, LEDGER
from pipelines.settings import OwlError, Settings, differences

log = logging.getLogger(__name__)


class Curation(Settings):
    """What a curated dataset is made of and held to."""

    limits: Limits = Limits()
    """Thresholds of the caption and picture filters."""
    short_side: int | None = None
    """Shorter side of stored pictures, in pixels; none is enlarged. None keeps the bytes as they are."""
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
    context.target_max_block_size = None  # a shard stays one block, whatever its size
    context.enable_progress_bars = False  # ours counts shards and samples
    work = [{"shard": shard, "path": path} for shard, path in todo.items()]
    with progress("curate", total, "shards", done=total - len(todo)) as counter:
        sink = ShardSink(output, todo, counter)
        (
            ray.data.from_items(work, override_num_blocks=len(work))
            .map_batches(read_raw, batch_size=1, batch_format="pyarrow")
            .map_batches(
                judge_rows,
                batch_size=None,
                batch_format="pyarrow",
                fn_kwargs={"limits": settings.limits.model_dump(), "short_side": settings.short_side},
            )
            .write_datasink(sink)
        )
    return sink.unreadable


RAW = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),
        ("source", pa.string()),
        ("images", pa.list_(pa.large_binary())),
        ("captions", pa.list_(pa.string())),
        ("messages", CURATED.field("messages").type),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
JUDGED = pa.schema([("shard", pa.string()), *CURATED, *(f for f in LEDGER if f.name not in CURATED.names)])


def read_raw(work: pa.Table) -> Iterator[pa.Table]:
    """One raw shard → its samples as rows. A file that is no shard becomes one row whose reason says so."""
    for item in work.to_pylist():
        try:
            rows = [asdict(sample) for sample in read_shard(item["path"])]
            if not rows:
                raise UnreadableShard(f"raw shard {item['path']} holds no sample")
        except UnreadableShard as error:
            rows = [asdict(RawSample("", item["path"], reason="shard_unreadable", detail=str(error)))]
        table = pa.Table.from_pylist(rows, schema=pa.schema([field for field in RAW if field.name != "shard"]))
        yield table.add_column(0, "shard", pa.array([item["shard"]] * len(table), pa.string()))


def judge_rows(table: pa.Table, limits: dict, short_side: int | None) -> pa.Table:
    """Every sample of a shard with its verdict and statistics; none is dropped here."""
    shards = table["shard"].to_pylist()
    samples = [RawSample(**row) for row in table.drop_columns(["shard"]).to_pylist()]
    rows = [judge(sample, Limits(**limits), short_side) for sample in samples]
    return pa.Table.from_pylist([{"shard": s, **row} for s, row in zip(shards, rows, strict=True)], schema=JUDGED)


class ShardSink(Datasink):
    """Writes each shard's Arrow, ledger and marker from the one block that holds it."""

    def __init__(self, output: str, raw: dict[str, str], counter: ray.actor.ActorHandle):
        self.output = output
        self.raw = raw
        self.counter = counter
        self.unreadable: list[str] = []

    def write(self, blocks: Iterable[pa.Table], ctx) -> list[str]:
        unreadable = []
        for block in blocks:
            rows = block.to_pylist()
            if not rows:
                continue
            if rows[0]["reason"] == "shard_unreadable":
                unreadable.append(rows[0]["detail"])
                continue
            shard = rows[0]["shard"]
            marker = ledger.write_shard(self.output, shard, self.raw[shard], rows)
            self.counter.advance.remote(1, f"{marker['kept']} of {marker['in']} kept in {shard}")
        return unreadable

    def on_write_complete(self, write_result) -> None:
        self.unreadable = [detail for details in write_result.write_returns for detail in details]


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
    return ledger.deselect(output, shard, duplicates)


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
