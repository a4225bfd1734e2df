"""Pages of an evaluation: figures beside published ones and controls, abilities, and pictures with answers, wrong ones
first; and two models beside each other."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from pipelines import storage
from pipelines.evaluation.benchmarks.base import Benchmark
from pipelines.page import bars, code, figure, numbers, page, paragraph, pictures, radar, section, table

SHOWN = 24
HEAD = ("type", "questions", "right picture", "95 % interval", "another picture", "no picture")
MOST_ON_RADAR = 16


def write_report(path: str, benchmark: Benchmark, results: dict, rows: list[dict]) -> None:
    asked = [row for row in rows if row["condition"] == "picture"]
    parts = [section("Overall", numbers(at_a_glance(results)), paragraph(benchmark.about))]
    if results["headline"] and benchmark.published:
        parts.append(section("Beside published figures", beside_published(benchmark, results)))
    if results["scores"].get("picture"):
        parts.append(section("By type of question", score_table(results["scores"])))
    if 3 <= len(abilities := abilities_of(benchmark, results)) <= MOST_ON_RADAR:
        parts.append(section("By ability", radar({results["model"]: abilities})))
    if results["metrics"]:
        parts.append(section("All metrics", table(("metric", "value"), flat(results["metrics"]))))
    parts.append(section("Answers", pictures(examples(asked))))
    failures = [(row["id"], row["error"]) for row in asked if row["error"] is not None]
    if failures:
        parts.append(section("Failed", table(("question", "error"), failures[:SHOWN], numeric=2)))
    parts.append(section("What this can be traced to", code(trace(results, asked))))
    storage.write_text(path, page("Evaluation", f"{results['benchmark']} · {results['model']}", *parts))


def at_a_glance(results: dict) -> dict[str, str]:
    made = {}
    if found := results["headline"]:
        made[f"{found['name']}, {found['low']:.4g} to {found['high']:.4g}"] = f"{found['value']:.4g}"
    made["questions"] = f"{results['questions']:,}"
    if results["graded"] < results["questions"]:
        made["graded"] = f"{results['graded']:,}"
    made["failed"] = f"{results['failed']:,}"
    return made


def beside_published(benchmark: Benchmark, results: dict) -> Markup:
    found = results["headline"]
    rows = [*benchmark.published.items(), (f"→ {results['model']}", found["value"])]
    drawn = [(name, value, f"{value:.4g}") for name, value in sorted(rows, key=lambda row: -row[1])]
    return bars(drawn, benchmark.most) + paragraph(
        f"{found['name']}; the figures of others are as they or the benchmark's authors report them; their prompts, "
        "splits and judges may differ from ours."
    )


def abilities_of(benchmark: Benchmark, results: dict) -> dict[str, float]:
    """Ability → share of what there is to get, 0 to 1."""
    if benchmark.abilities and results["metrics"]:
        return benchmark.abilities(results["metrics"])
    by_type = results["scores"].get("picture", {})
    return {name: entry["accuracy"] for name, entry in by_type.items() if not name.startswith("all")}


def flat(metrics: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in metrics.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{name} · ")
        elif isinstance(value, list):
            rows.append((f"{prefix}{name}", ", ".join(f"{one:.4g}" for one in value)))
        else:
            rows.append((f"{prefix}{name}", f"{value:,.4f}" if isinstance(value, float) else str(value)))
    return rows


def score_table(scores: dict) -> Markup:
    return table(HEAD, score_rows(scores))


def score_rows(scores: dict) -> list[tuple[str, ...]]:
    """Types down, conditions across; an interval of 95 % beside the mean score."""
    rows = []
    for kind, entry in scores["picture"].items():
        controls = [scores.get(name, {}).get(kind) for name in ("wrong picture", "no picture")]
        cells = [f"{control['accuracy']:.1%}" if control else "–" for control in controls]
        interval = f"{entry['low']:.1%} – {entry['high']:.1%}"
        rows.append((kind.replace("_", " "), f"{entry['n']:,}", f"{entry['accuracy']:.1%}", interval, *cells))
    return rows


def examples(asked: list[dict]) -> list[Markup]:
    """Half wrong answers, half right ones, as far as there are that many; those with pictures, where some have any."""
    shown = [row for row in asked if row["pictures"]] or asked
    wrong = spread([row for row in shown if not row["score"]], SHOWN // 2)
    right = spread([row for row in shown if row["score"]], SHOWN - len(wrong))
    return [answered(row) for row in [*wrong, *right]]


def spread(rows: list[Any], count: int) -> list[Any]:
    """``count`` rows at equal distances."""
    return [rows[number * len(rows) // count] for number in range(count)] if len(rows) > count else rows


def answered(row: dict) -> Markup:
    kind = "" if row["score"] is None else "right" if row["score"] else "wrong"
    caption = Markup('{}<br><span class="{}">{}</span>').format(row["prompt"], kind, row["answer"] or row["error"])
    if kind == "wrong" and (expected := expected_of(row["facts"])):
        caption += Markup("<br>expected: {}").format(expected)
    return figure([read_picture(path) for path in row["pictures"]], caption)


def expected_of(facts: dict) -> str:
    """What a question's facts name as its answer."""
    for name in ("answer", "label", "answers", "references", "reference"):
        if name in facts:
            value = facts[name]
            return ", ".join(dict.fromkeys(map(str, value))) if isinstance(value, list) else str(value)
    return ""


def read_picture(path: str) -> bytes | None:
    """None where it is no longer there: a page outlives its pictures."""
    if not storage.exists(path):
        return None
    with storage.open_read(path) as file:
        return file.read()


def trace(results: dict, asked: list[dict]) -> str:
    lines = [f"{name}: {results[name]}" for name in ("benchmark", "model", "model_sha256", "split_sha256", "decoding")]
    return "\n".join([*lines, "", "The first prompt:", asked[0]["prompt"] if asked else ""])


def write_comparison(path: str, found: dict, pairs: list[tuple[dict, dict]]) -> None:
    """``pairs`` are the answers of both to questions that one of them answered better."""
    first, second = found["first"], found["second"]
    rows = [
        ("mean score", f"{first['mean']:.2%}", f"{second['mean']:.2%}"),
        ("better answers", f"{found['only_first_better']:,}", f"{found['only_second_better']:,}"),
    ]
    lead = f"{found['benchmark']} · {found['questions']:,} questions"
    difference = f"{found['difference']:+.2%}"
    parts = [
        section(
            "Overall",
            numbers({f"second − first, 95 %: {found['low']:+.2%} to {found['high']:+.2%}": difference}),
            table(("", f"first: {first['model']}", f"second: {second['model']}"), rows),
        ),
        section("Where they differ", pictures([differing(one, two) for one, two in spread(pairs, SHOWN)])),
    ]
    storage.write_text(path, page("Two models, the same questions", lead, *parts))


def differing(one: dict, two: dict) -> Markup:
    caption = Markup("{}").format(one["prompt"])
    for name, row in (("first", one), ("second", two)):
        kind = "right" if row["score"] else "wrong"
        caption += Markup('<br>{}: <span class="{}">{}</span>').format(name, kind, row["answer"])
    return figure([read_picture(path) for path in one["pictures"]], caption)
