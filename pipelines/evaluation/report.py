"""Pages of an evaluation: figures beside published ones and controls, abilities, and pictures with answers, wrong ones
first; and two models beside each other."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from pipelines import storage
from pipelines.evaluation.benchmarks import named
from pipelines.evaluation.benchmarks.base import Benchmark
from pipelines.page import bars, code, figure, numbers, page, paragraph, pictures, radar, section, table

SHOWN = 24
CONTROLS = {"wrong picture": "another picture", "no picture": "no picture"}
MOST_ON_RADAR = 16


def write_report(path: str, benchmark: Benchmark, results: dict, rows: list[dict]) -> None:
    asked = [row for row in rows if row["condition"] == "picture"]
    parts = [section("Overall", numbers(at_a_glance(results)), paragraph(benchmark.about))]
    if results["graded"] == results["questions"] and benchmark.published:
        parts.append(section("Beside published figures", beside_published(benchmark, results)))
    if results["scores"].get("picture"):
        parts.append(section("By type of question", score_table(results["scores"])))
    if 3 <= len(abilities := abilities_of(benchmark, results)) <= MOST_ON_RADAR:
        parts.append(section("By ability", radar({results["model"]: abilities})))
    parts.append(section("Answers", pictures(examples(asked))))
    if results["metrics"]:
        parts.append(section("All metrics", *metric_tables(results["metrics"])))
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
    ours = storage.name_of(results["model"])
    rows = [*benchmark.published.items(), (ours, found["value"])]
    drawn = [(name, value, f"{value:.4g}") for name, value in sorted(rows, key=lambda row: -row[1])]
    return bars(drawn, benchmark.most, ours) + paragraph(
        f"{found['name']}; the figures of others are as they or the benchmark's authors report them; their prompts, "
        "splits and judges may differ from ours."
    )


def abilities_of(benchmark: Benchmark, results: dict) -> dict[str, float]:
    """Ability → share of what there is to get, 0 to 1."""
    if benchmark.abilities and results["metrics"]:
        return benchmark.abilities(results["metrics"])
    by_type = results["scores"].get("picture", {})
    return {name: entry["accuracy"] for name, entry in by_type.items() if not name.startswith("all")}


def metric_tables(metrics: dict[str, Any]) -> list[Markup]:
    """Single figures in one table; those that belong together, such as a task's or an ability's, in one each."""
    single = [(name, told(value)) for name, value in metrics.items() if not isinstance(value, dict)]
    made = [table(("", "value"), single)] if single else []
    for name, group in metrics.items():
        if isinstance(group, dict):
            rows = group if all(isinstance(value, dict) for value in group.values()) else {name: group}
            columns = list(dict.fromkeys(key for row in rows.values() for key in row))
            body = [(kind, *(told(row.get(column)) for column in columns)) for kind, row in rows.items()]
            made.append(table((name, *columns), body))
    return made


def told(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(told, value))
    return "–" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def score_table(scores: dict) -> Markup:
    return table(score_head(scores), score_rows(scores))


def score_head(scores: dict) -> tuple[str, ...]:
    controls = [title for name, title in CONTROLS.items() if name in scores]
    return ("type", "questions", "right picture" if controls else "score", "95 % interval", *controls)


def score_rows(scores: dict) -> list[tuple[str, ...]]:
    """Types down, conditions across as far as they were run; an interval of 95 % beside the mean score."""
    rows = []
    for kind, entry in scores["picture"].items():
        controls = [scores[name].get(kind) for name in CONTROLS if name in scores]
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
    words = row["prompt"].replace("<image>", "").strip()
    caption = Markup('{}<br><span class="{}">{}</span>').format(words, kind, row["answer"] or row["error"])
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
    return storage.read_bytes(path) if storage.exists(path) else None


def trace(results: dict, asked: list[dict]) -> str:
    lines = [f"{name}: {results[name]}" for name in ("benchmark", "model", "model_sha256", "split_sha256", "decoding")]
    return "\n".join([*lines, "", "The first prompt:", asked[0]["prompt"] if asked else ""])


def table_of(found: dict[str, dict], ours: str) -> dict[str, Any]:
    """Benchmark → results, as a table: this model first, then every system of which there is a published figure."""
    published = {name: named(name).published for name in found}
    systems = list(dict.fromkeys(plain_name(system) for row in published.values() for system in row))
    rows = [[ours, *(figure_of(results["headline"]) for results in found.values())]]
    for system in systems:
        cells = [{plain_name(name): told(value) for name, value in row.items()} for row in published.values()]
        rows.append([system, *(cell.get(system, "–") for cell in cells)])
    return {"head": ["", *found], "rows": rows}


def plain_name(system: str) -> str:
    """Without what is said of its split."""
    return system.partition(" (")[0]


def figure_of(headline: dict | None) -> str:
    return "ungraded" if headline is None else f"{headline['value']:.4g}"


def write_table(path: str, model: str, found: dict[str, Any]) -> None:
    note = "Of this model the figures with their intervals are in each benchmark's own report; others are as published."
    links = [Markup('<a href="{0}/report.html">{0}</a>').format(name) for name in found["head"][1:]]
    drawn = table(["", *links], found["rows"])
    storage.write_text(path, page("Evaluation", model, section("Benchmarks", drawn, paragraph(note))))


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
