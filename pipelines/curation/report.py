"""report.html of a curated dataset: the funnel, what sizes and captions came in, and pictures kept and dropped."""

from __future__ import annotations

import numpy as np

from pipelines import storage
from pipelines.curation.filters import REASONS
from pipelines.curation.ledger import read_ledger
from pipelines.curation.sources import UnreadableShard, read_sample
from pipelines.page import bars, figure, numbers, page, paragraph, pictures, section, table

SHOWN = 6
"""Pictures shown for each reason."""


def write_report(path: str, output: str, manifest: dict) -> None:
    kept, dropped = manifest["kept"], manifest["dropped"]
    lead = f"{manifest['in']:,} samples from {len(manifest['shards'])} raw shards in {manifest['seconds']} s"
    examples, stats = read_examples(output, manifest)
    parts = [
        section(
            "Funnel",
            numbers({"came in": f"{manifest['in']:,}", "kept": f"{kept:,}", "dropped": f"{manifest['in'] - kept:,}"}),
            bars(funnel(manifest)),
        ),
        section("Kept", pictures([figure([data], words) for data, words in examples.pop("", [])])),
    ]
    for reason, found in sorted(examples.items()):
        title = f"Dropped: {reason} ({dropped[reason]:,})"
        parts.append(
            section(title, paragraph(REASONS[reason]), pictures([figure([data], words) for data, words in found]))
        )
    parts += [section(name, bars(histogram(values))) for name, values in stats.items() if len(values)]
    rows = [
        (entry["shard"], entry["in"], entry["kept"], sum(entry["dropped"].values())) for entry in manifest["shards"]
    ]
    parts.append(section("The books, by raw shard", table(("shard", "in", "kept", "dropped"), rows)))
    storage.write_text(path, page("Curation report", lead, *parts))


def funnel(manifest: dict) -> list[tuple[str, float, str]]:
    """What remains after each reason, in the order in which reasons are looked for."""
    left = manifest["in"]
    rows = [("came in", left, f"{left:,}")]
    for reason in REASONS:
        if number := manifest["dropped"].get(reason):
            left -= number
            rows.append((f"− {reason}", left, f"−{number:,}"))
    return [*rows, ("kept", manifest["kept"], f"{manifest['kept']:,}")]


def read_examples(output: str, manifest: dict) -> tuple[dict, dict]:
    """Up to SHOWN (picture, words) for each reason ("" = kept), and the statistics of up to 20 shards."""
    examples: dict[str, list] = {}
    stats: dict[str, list] = {"Shorter side, px": [], "Words of the first caption": [], "Bytes": []}
    for entry in manifest["shards"][:20]:
        columns = ["key", "source", "reason", "detail", "width", "height", "words", "bytes"]
        for row in read_ledger(output, entry["shard"], columns).to_pylist():
            if row["width"]:
                stats["Shorter side, px"].append(min(row["width"], row["height"]))
                stats["Bytes"].append(row["bytes"])
            if row["words"] is not None:
                stats["Words of the first caption"].append(row["words"])
            found = examples.setdefault(row["reason"] or "", [])
            if len(found) < SHOWN:
                found.append(example(entry["raw"], row))
    return examples, stats


def example(raw: str, row: dict) -> tuple[bytes | None, str]:
    """The raw picture and its caption, read again from the raw shard by its place there."""
    words = row["detail"] or ""
    try:
        sample = read_sample(raw, row["source"])
    except UnreadableShard:
        return None, words
    caption = sample.captions[0] if sample.captions else ""
    return (sample.images[0] if sample.images else None), " · ".join(filter(None, (words, caption[:120])))


def histogram(values: list[float], most_bins: int = 12) -> list[tuple[str, float, str]]:
    """Up to 12 bins between the 1st and the 99th percentile."""
    data = np.asarray(values)
    low, high = np.percentile(data, [1, 99])
    bins = int(min(most_bins, max(1, high - low)))
    heights, edges = np.histogram(np.clip(data, low, high), bins=bins)
    return [(f"{edges[i]:,.0f} – {edges[i + 1]:,.0f}", float(n), f"{n:,}") for i, n in enumerate(heights)]
