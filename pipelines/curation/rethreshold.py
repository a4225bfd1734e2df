"""Thresholds moved after the fact.

Tighter ones, and looser ones for what a tighter one had left out, need the ledger only: what they decide goes into the
selection. What was never stored is read again, each raw sample by its offset, and only those whose reason no longer
holds by their statistics; what they yield is appended to their shard.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipelines import storage
from pipelines.curation import ledger
from pipelines.curation.curate import write_manifest
from pipelines.curation.decode import judge
from pipelines.curation.filters import REASONS, Limits
from pipelines.curation.options import Curation
from pipelines.curation.scoring import score
from pipelines.curation.sources import read_sample
from pipelines.curation.verdicts import parts_of, reason_now, settle
from pipelines.curation.versions import Lock, writing
from pipelines.records import LEDGER
from pipelines.settings import OwlError

JUDGED = [reason for reason in REASONS if reason.startswith(("caption_", "image_")) or reason == "blocked"]
"""Reasons that came of looking at a sample."""
FOR_GOOD = ("image_missing", "image_corrupt", "image_truncated")
"""Those among them that no threshold changes."""


def rethreshold(output: str, limits: Limits) -> dict[str, Any]:
    """Holds a dataset to other limits; returns the new manifest, where "read_again" counts the raw samples that were
    opened. Raises OwlError where captions would have to be masked, or unmasked, in shards that are written. Of a row
    with several captions, those that were dropped alone stay dropped."""
    with writing(output) as lock:
        return hold_to(output, limits, lock)


def hold_to(output: str, limits: Limits, lock: Lock) -> dict[str, Any]:
    manifest = ledger.manifest_of(output)
    before = Curation.model_validate(manifest["settings"])
    if (before.limits.contacts == "mask") != (limits.contacts == "mask"):
        raise OwlError(
            f"limits.contacts {before.limits.contacts} → {limits.contacts} changes the captions that {output} stored; "
            "curate into another folder"
        )
    settings = Curation.model_validate({**manifest["settings"], "limits": limits})
    raws = {entry["shard"]: entry["raw"] for entry in manifest["shards"]}
    given = ray.put((output, list(raws.items()), settings, limits.max_pixels > before.limits.max_pixels))
    read_again = sum(ray.get([let_in.remote(given, part) for part in parts_of(raws)]))
    if settings.scoring.wanted:
        score(output, list(raws), settings.scoring)
    entries = settle(output, list(raws), settings, moved=True)
    storage.write_json(f"{output}/settings.json", settings.model_dump())
    facts = {name: manifest[name] for name in ("run", "set_aside", "withdrawn", "decontaminated") if name in manifest}
    return write_manifest(output, settings, entries, {**facts, "read_again": read_again}, "rethreshold", lock)


@ray.remote(num_cpus=1, max_retries=-1)
def let_in(given: tuple[str, list[tuple[str, str]], Curation, bool], part: tuple[int, int]) -> int:
    """Reads again what the new limits may let into some shards; returns how many raw samples that were."""
    output, shards, settings, larger = given
    return sum(let_in_shard(output, shard, raw, settings, larger) for shard, raw in shards[slice(*part)])


def let_in_shard(output: str, shard: str, raw: str, settings: Curation, larger: bool) -> int:
    """``larger`` says that pictures may have more pixels than before: their number is not in the ledger."""
    table = ledger.read_ledger(output, shard)
    judged = pc.is_in(table["reason"], value_set=pa.array(JUDGED))
    places = np.flatnonzero(pc.and_(table["row"].is_null(), judged)).tolist()
    books = table.to_pylist()
    again = []
    for place in places:
        row = books[place]
        if reason := reason_now(row, settings.limits):
            row["reason"] = reason
        elif row["reason"] not in FOR_GOOD and (row["reason"] != "image_bomb" or larger):
            again.append(place)
    first = table["row"].drop_null()
    fit: list[dict] = []
    for place in again:
        sample = read_sample(raw, books[place]["source"])
        row = judge(sample, settings.limits, settings.pictures, settings.deduplication is not None)
        row["verdict"] = "dropped"
        if row["reason"] is None:
            row["verdict"], row["row"] = "kept", len(first) + len(fit)
            fit.append(row)
        books[place] = {name: row.get(name) for name in LEDGER.names}
    marker = storage.read_json(f"{output}/markers/{shard}.json")
    if fit:
        marker["sha256"] = ledger.append_rows(output, shard, fit)
        storage.remove(f"{output}/scores/{shard}.parquet")
    if places:
        ledger.write_ledger(output, shard, pa.Table.from_pylist(books, schema=LEDGER))
        reasons = [row["reason"] for row in books]
        ledger.write_marker(output, shard, raw, reasons, len(first) + len(fit), marker["sha256"])
    return len(again)
