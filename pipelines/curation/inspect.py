"""A look into a curated dataset: what a recipe would do, what became of a sample, what changed between two datasets."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow.compute as pc

from pipelines.curation import ledger
from pipelines.curation.decode import judge
from pipelines.curation.ledger import manifest_of
from pipelines.curation.options import Curation
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


def explain(dataset: str, key: str) -> list[dict[str, Any]]:
    """Every ledger row of that key, with its raw shard and the place of its curated row. Raises OwlError if there is
    none."""
    found = []
    output, _ = ledger.folder_and_version(dataset)
    for entry in manifest_of(dataset)["shards"]:
        table = ledger.read_ledger(output, entry["shard"])
        for row in table.filter(pc.equal(table["key"], key)).to_pylist():
            place = None if row["row"] is None else f"{output}/shards/{entry['shard']}.arrow row {row['row']}"
            found.append({**row, "raw": entry["raw"], "curated": place})
    if not found:
        raise OwlError(f"no sample {key!r} ever came into {dataset}")
    return found


# --- diff ------------------------------------------------------------------------------------------------------------


def diff(before: str, after: str) -> dict[str, Any]:
    """What became of the same raw samples in two datasets, or versions of them: {"same", "moved": {"kept →
    caption_short": n}, "only_before", "only_after"}. One pair of ledgers is in memory at a time; raw paths tell shards
    apart."""
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


def verdicts(dataset: str, shard: str) -> dict[str, str]:
    """Source → "kept", or the reason why not."""
    table = ledger.read_ledger(ledger.folder_and_version(dataset)[0], shard, ["source", "reason"])
    return {s: r or "kept" for s, r in zip(table["source"].to_pylist(), table["reason"].to_pylist(), strict=True)}
