"""The verdicts that come after a shard is written: by scores, by thresholds that moved, and on duplicates.

They go into the ledger and the selection; no shard is written anew. What a later verdict dropped, a later one can bring
back: its row is still in the shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized

import pyarrow as pa
import ray

from pipelines import storage
from pipelines.curation import ledger
from pipelines.curation.dedup import LATER, cut, remove_duplicates
from pipelines.curation.filters import (
    REASONS,
    HeaderStats,
    Limits,
    PixelStats,
    Scores,
    is_blocked,
    judge_captions,
    judge_header,
    judge_pixels,
    judge_scores,
)
from pipelines.curation.options import Curation
from pipelines.records import LEDGER, SCORES

SCORE_NAMES = [name for name in SCORES.names if name in LEDGER.names and name != "row"]
SHARDS_A_TASK = 256


def settle(
    output: str, shards: list[str], settings: Curation, settled: Mapping[str, int] | None = None, moved: bool = False
) -> list[dict]:
    """Enters all later verdicts on ``shards``; returns each one's entry of the books. ``settled`` are shards whose
    verdicts stand, with the samples that they keep; ``moved`` says that thresholds are others than the shards were
    judged by."""
    again = moved or settings.scoring.wanted
    given = ray.put((output, shards, settings.limits))
    task = judge_again if again else read_entries
    entries = [entry for part in ray.get([task.remote(given, part) for part in parts_of(shards)]) for entry in part]
    if settings.deduplication is None:
        return entries
    kept = sum(entry["kept"] for entry in entries)
    return remove_duplicates(output, shards, kept, settings.deduplication, settled)


def parts_of(shards: Sized) -> list[tuple[int, int]]:
    """Ranges of shards, each for one task."""
    return cut(0, len(shards), max(8, -(-len(shards) // SHARDS_A_TASK)))


@ray.remote(num_cpus=1, max_retries=-1)
def read_entries(given: tuple[str, list[str], Limits], part: tuple[int, int]) -> list[dict]:
    """Shards' entries of the books as they stand, with what was decided before."""
    output, shards, _ = given
    return [ledger.decide(output, shard, [], ()) for shard in shards[slice(*part)]]


@ray.remote(num_cpus=1, max_retries=-1)
def judge_again(given: tuple[str, list[str], Limits], part: tuple[int, int]) -> list[dict]:
    """Holds the curated rows of some shards to the limits, by the statistics and scores that are there."""
    output, shards, limits = given
    return [judge_shard_again(output, shard, limits) for shard in shards[slice(*part)]]


def judge_shard_again(output: str, shard: str, limits: Limits) -> dict:
    decided = []
    for place, row in enumerate(with_scores(output, shard).to_pylist()):
        if row["row"] is not None and (reason := reason_now(row, limits)):
            decided.append({"place": place, "reason": reason, "detail": "by a later look at its statistics"})
    before = [reason for reason in REASONS if reason not in (*LATER, "benchmark")]
    return ledger.decide(output, shard, decided, instead_of=before)


def with_scores(output: str, shard: str) -> pa.Table:
    """A shard's ledger, into which its scores, where there are any, are copied."""
    path = f"{output}/scores/{shard}.parquet"
    table = ledger.read_ledger(output, shard)
    if not storage.exists(path):
        return table
    scores = storage.read_parquet(path, ["row", *SCORE_NAMES])
    place = ledger.places_of(table["row"], scores["row"])
    for name in SCORE_NAMES:
        table = ledger.set_column(table, name, scores[name].combine_chunks().take(place))
    ledger.write_ledger(output, shard, table)
    return table


def reason_now(row: dict, limits: Limits) -> str | None:
    """What a ledger row's statistics say against it, as far as it has any; None for nothing. Of several captions, one
    that is fit is enough."""
    if is_blocked(row["url"], (row["sha256"], row["phash"]), limits):
        return "blocked"
    if row["captions"] is not None:
        _, reasons = judge_captions(row["captions"], limits)
        if all(reasons):
            return reasons[0]
    if row["width"] is None:
        return None
    header = HeaderStats(row["bytes"], row["width"], row["height"], bool(row["animated"]))
    if reason := judge_header(header, limits):
        return reason
    if row["entropy"] is not None and (reason := judge_pixels(PixelStats(row["entropy"], row["sharpness"]), limits)):
        return reason
    return judge_scores(Scores(*(row[name] for name in SCORE_NAMES)), limits)
