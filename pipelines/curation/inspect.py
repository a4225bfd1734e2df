"""A look into a curated dataset, and a second thought: what a recipe would do, what became of a sample, what changed
between two datasets, and thresholds moved without opening a picture.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow.compute as pc
import ray

from pipelines import storage
from pipelines.curation import ledger
from pipelines.curation.curate import Curation
from pipelines.curation.decode import judge
from pipelines.curation.filters import (
    HeaderStats,
    Limits,
    PixelStats,
    caption_stats,
    judge_caption,
    judge_header,
    judge_pixels,
)
from pipelines.curation.ledger import manifest_of
from pipelines.curation.sources import find_shards, read_shard
from pipelines.settings import OwlError

# --- preview ---------------------------------------------------------------------------------------------------------


def preview(raw: list[str], settings: Curation, samples: int) -> dict[str, Any]:
    """What the filters would do to about ``samples`` samples, taken from the beginnings of shards spread over the
    input; nothing is written, and duplicates are not looked for. Returns counts, and up to three samples by reason."""
    shards = find_shards(raw)
    chosen = shards[:: max(1, len(shards) // 20)][:20]
    rows = [row for path in chosen for row in judged_first(path, settings, -(-samples // len(chosen)))]
    examples: dict[str, list[dict]] = {}
    for row in rows:
        found = examples.setdefault(row["reason"] or "kept", [])
        if len(found) < 3:
            found.append({"key": row["key"], "source": row["source"], "detail": row["detail"]})
    return {"in": len(rows), **ledger.counts([row["reason"] for row in rows]), "examples": examples}


def judged_first(path: str, settings: Curation, count: int) -> Iterator[dict]:
    for sample in itertools.islice(read_shard(path), count):
        yield judge(sample, settings.limits, settings.pictures, settings.deduplication is not None)


# --- explain ---------------------------------------------------------------------------------------------------------


def explain(output: str, key: str) -> list[dict[str, Any]]:
    """Every ledger row of that key, with its raw shard and the place of its curated row. Raises OwlError if there is
    none."""
    found = []
    for entry in manifest_of(output)["shards"]:
        table = ledger.read_ledger(output, entry["shard"])
        for row in table.filter(pc.equal(table["key"], key)).to_pylist():
            del row["thumbnail"]
            place = None if row["row"] is None else f"{output}/shards/{entry['shard']}.arrow row {row['row']}"
            found.append({**row, "raw": entry["raw"], "curated": place})
    if not found:
        raise OwlError(f"no sample {key!r} ever came into {output}")
    return found


# --- diff ------------------------------------------------------------------------------------------------------------


def diff(before: str, after: str) -> dict[str, Any]:
    """What became of the same raw samples in two datasets: {"same", "moved": {"kept → caption_short": n},
    "only_before", "only_after"}. One pair of ledgers is in memory at a time; raw paths tell shards apart."""
    first, second = ({entry["raw"]: entry["shard"] for entry in manifest_of(o)["shards"]} for o in (before, after))
    moved: Counter = Counter()
    same = 0
    for raw in sorted(first.keys() & second.keys()):
        old, new = (verdicts(output, shards[raw]) for output, shards in ((before, first), (after, second)))
        for source, verdict in old.items():
            now = new.get(source, "absent")
            if now == verdict:
                same += 1
            else:
                moved[f"{verdict} → {now}"] += 1
    return {
        "same": same,
        "moved": dict(moved.most_common()),
        "only_before": sorted(first.keys() - second.keys()),
        "only_after": sorted(second.keys() - first.keys()),
    }


def verdicts(output: str, shard: str) -> dict[str, str]:
    """Source → "kept", or the reason why not."""
    table = ledger.read_ledger(output, shard, ["source", "reason"])
    return {s: r or "kept" for s, r in zip(table["source"].to_pylist(), table["reason"].to_pylist(), strict=True)}


# --- rethreshold -----------------------------------------------------------------------------------------------------


def rethreshold(output: str, limits: Limits) -> dict[str, Any]:
    """Holds a dataset to tighter limits: verdicts go into the ledger and rows into the selection, by the statistics
    that are there; no picture is read and no shard written anew. Returns the new manifest. Raises OwlError for a limit
    that is looser than the dataset's, as what it would let in was never stored. Of a row with several captions, those
    that fail alone stay with those that do not."""
    manifest = manifest_of(output)
    before = Limits.model_validate(manifest["settings"]["limits"])
    if looser := [
        name for name in Limits.model_fields if is_looser(name, getattr(before, name), getattr(limits, name))
    ]:
        told = ", ".join(f"limits.{name} {getattr(before, name)!r} → {getattr(limits, name)!r}" for name in looser)
        raise OwlError(f"{told} would let in what {output} never stored; curate into another folder")
    shards = [entry["shard"] for entry in manifest["shards"]]
    entries = ray.get([tighten.remote(output, shard, limits.model_dump()) for shard in shards])
    ledger.check_books(entries)
    manifest |= {**ledger.total(entries), "shards": entries}
    manifest["settings"]["limits"] = limits.model_dump()
    storage.write_json(f"{output}/settings.json", manifest["settings"])
    storage.write_json(f"{output}/manifest.json", manifest)
    return manifest


def is_looser(name: str, old: Any, new: Any) -> bool:
    if name.startswith("min_"):
        return new < old
    if name.startswith("max_"):
        return new > old
    if name == "languages":
        return bool(old) and not (new and set(new) <= set(old))
    if name == "boilerplate":
        return not set(old) <= set(new)
    if name == "contacts":
        return new != old and new != "drop"
    return new and not old  # animated


@ray.remote(num_cpus=0.5)
def tighten(output: str, shard: str, limits: dict) -> dict:
    rules = Limits.model_validate(limits)
    table = ledger.read_ledger(output, shard)
    kept = table.filter(pc.and_(table["row"].is_valid(), table["reason"].is_null()))
    captions = storage.open_arrow(f"{output}/shards/{shard}.arrow").read_all().column("caption")
    decided = []
    for row in kept.to_pylist():
        if reason := reason_now(row, captions[row["row"]].as_py(), rules):
            decided.append({"row": row["row"], "key": row["key"], "reason": reason, "detail": "limits were tightened"})
    return ledger.deselect(output, shard, decided)


def reason_now(row: dict, captions: list[str] | None, rules: Limits) -> str | None:
    """A kept row's reason to go: all of its captions fail, or its first picture does."""
    if captions:
        stats = [caption_stats(caption, bool(rules.languages)) for caption in captions]
        reasons = [judge_caption(caption, stat, rules) for caption, stat in zip(captions, stats, strict=True)]
        if all(reasons):
            return reasons[0]
    if row["bytes"] is None:
        return None
    header = HeaderStats(row["bytes"], row["width"], row["height"], bool(row["animated"]))
    if reason := judge_header(header, rules):
        return reason
    if row["entropy"] is None:
        return None
    return judge_pixels(PixelStats(row["entropy"], row["sharpness"]), rules)
