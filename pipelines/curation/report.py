"""report.html of a curated dataset: the funnel, what came in beside the thresholds it was held to, pictures kept and
dropped, captions and languages, speed and cost.

Counts are of all samples; histograms, captions, languages and pictures are of the first SHARDS_READ shards.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import NamedTuple

from markupsafe import Markup

from pipelines import storage
from pipelines.curation.filters import REASONS, language_of
from pipelines.curation.ledger import read_ledger
from pipelines.curation.sources import UnreadableShard, read_sample
from pipelines.page import bars, columns, figure, histogram, numbers, page, paragraph, pictures, section, table
from pipelines.settings import OwlError

SHARDS_READ = 20
SHOWN = 6
"""Pictures shown for each reason."""
MOST_ROWS = 40
"""Shards named in the table, those that lost most."""
CAPTIONS_TOLD = 2000
"""Captions whose language is looked up for the report, where the run did not ask for languages."""


class Measure(NamedTuple):
    """One histogram: of a ledger column, beside these limits."""

    title: str
    column: str
    limits: tuple[str, ...]


MEASURES = (
    Measure("Words of the first caption", "words", ("min_words", "max_words")),
    Measure("Shorter side, px", "side", ("min_side",)),
    Measure("Longer side over shorter", "aspect", ("max_aspect",)),
    Measure("Bytes of the file", "bytes", ("min_bytes",)),
    Measure("Share of letters", "letters", ("min_letters",)),
    Measure("Share of the commonest word", "repetition", ("max_repetition",)),
    Measure("Entropy, bits", "entropy", ("min_entropy",)),
    Measure("Sharpness", "sharpness", ("min_sharpness",)),
    Measure("Caption and picture, cosine", "image_text", ("min_image_text",)),
    Measure("Aesthetic score", "aesthetic", ("min_aesthetic",)),
    Measure("Unsafe, probability", "unsafe", ("max_unsafe",)),
    Measure("Watermark, probability", "watermark", ("max_watermark",)),
)


class Seen(NamedTuple):
    """What the first shards' ledgers hold."""

    examples: dict[str, list[tuple[bytes | None, str]]]
    """Reason ("" = kept) → up to SHOWN pictures and what is said of them."""
    values: dict[str, list[float]]
    captions: Counter
    languages: Counter


def write_report(path: str, output: str, manifest: dict) -> None:
    kept, dropped = manifest["kept"], manifest["dropped"]
    lead = f"{manifest['in']:,} samples from {len(manifest['shards']):,} raw shards"
    seen = look(output, manifest)
    parts = [
        section(
            "Funnel",
            numbers({"came in": f"{manifest['in']:,}", "kept": f"{kept:,}", "dropped": f"{manifest['in'] - kept:,}"}),
            bars(funnel(manifest)),
        ),
        *speed(manifest, manifest["settings"]["cpu_hour_price"]),
        section("Kept", pictures([figure([data], words) for data, words in seen.examples.pop("", [])])),
    ]
    for reason, found in sorted(seen.examples.items()):
        title = f"Dropped: {reason} ({dropped[reason]:,})"
        shown = pictures([figure([data], words) for data, words in found])
        parts.append(section(title, paragraph(REASONS[reason]), shown))
    parts.append(section("What came in, and the thresholds", columns(charts(seen.values, manifest["settings"]))))
    parts.append(section("Commonest captions", table(("caption", "times"), common(seen.captions))))
    parts.append(section("Languages of captions", languages(seen.languages)))
    parts += books(manifest)
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


def speed(manifest: dict, price: float) -> list[Markup]:
    """Samples a second of the run that wrote the manifest, and what a billion would cost at its pace."""
    run = manifest["run"]
    if not run["samples"]:
        return []
    rate = run["samples"] / run["seconds"]
    hours = 1e9 / rate * run["cpus"] / 3600
    figures = {
        "seconds": f"{run['seconds']:,.0f}",
        "samples a second": f"{rate:,.0f}",
        "CPUs": f"{run['cpus']:g}",
        "CPU hours for a billion": f"{hours:,.0f}",
        f"for a billion, at {price:g} a CPU hour": f"{hours * price:,.0f}",
    }
    return [section("Speed and cost", paragraph("Of this run, with all it took to start."), numbers(figures))]


def look(output: str, manifest: dict) -> Seen:
    seen = Seen({}, defaultdict(list), Counter(), Counter())
    for entry in manifest["shards"][:SHARDS_READ]:
        for row in read_ledger(output, entry["shard"]).to_pylist():
            if row["width"]:
                row["side"] = min(row["width"], row["height"])
                row["aspect"] = max(row["width"], row["height"]) / row["side"]
            for measure in MEASURES:
                if row.get(measure.column) is not None:
                    seen.values[measure.column].append(row[measure.column])
            seen.captions.update(row["captions"] or ())
            if row["language"]:
                seen.languages[row["language"]] += 1
            found = seen.examples.setdefault(row["reason"] or "", [])
            if len(found) < SHOWN:
                found.append(example(entry["raw"], row))
    if not seen.languages:
        tell_languages(seen)
    return seen


def tell_languages(seen: Seen) -> None:
    try:
        seen.languages.update(map(language_of, list(seen.captions)[:CAPTIONS_TOLD]))
    except OwlError:  # the detector is an extra
        return


def example(raw: str, row: dict) -> tuple[bytes | None, str]:
    """The raw picture and its caption, read again from the raw shard by its place there."""
    words = row["detail"] or ""
    try:
        sample = read_sample(raw, row["source"])
    except UnreadableShard:
        return None, words
    caption = sample.captions[0] if sample.captions else ""
    return (sample.images[0] if sample.images else None), " · ".join(filter(None, (words, caption[:120])))


def charts(values: dict[str, list[float]], settings: dict) -> list[Markup]:
    """A histogram for each measure that has values, with those thresholds that are in force."""
    found = []
    for measure in MEASURES:
        if values[measure.column]:
            lines = {name: settings["limits"][name] for name in measure.limits}
            lines = {f"{name} {value:g}": value for name, value in lines.items() if value}
            found.append(histogram(measure.title, values[measure.column], lines))
    return found


def common(captions: Counter) -> list[tuple[str, str]]:
    return [(caption[:160], f"{number:,}") for caption, number in captions.most_common(12)]


def languages(found: Counter) -> Markup:
    if not found:
        return paragraph("Not looked up: pip install 'owl-vlm[languages]' brings the detector.")
    return bars([(name, number, f"{number:,}") for name, number in found.most_common(12)])


def books(manifest: dict) -> list[Markup]:
    """The shards that lost most, and those that were set aside."""
    entries = sorted(manifest["shards"], key=lambda entry: entry["kept"] / max(1, entry["in"]))
    rows = [
        (entry["shard"], f"{entry['in']:,}", f"{entry['kept']:,}", f"{sum(entry['dropped'].values()):,}")
        for entry in entries[:MOST_ROWS]
    ]
    title = "The books, by raw shard" + (f": the {MOST_ROWS} that lost most" if len(entries) > MOST_ROWS else "")
    parts = [section(title, table(("shard", "in", "kept", "dropped"), rows))]
    if manifest["set_aside"]:
        parts.append(section("Set aside", table(("shard", "why"), list(manifest["set_aside"].items()), numeric=2)))
    return parts
