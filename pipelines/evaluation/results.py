"""Scored answers → figures with intervals, and two runs beside each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.evaluation.benchmarks import named
from pipelines.evaluation.benchmarks.base import Benchmark
from pipelines.evaluation.metrics import bootstrap_interval, resamples
from pipelines.records import ANSWERS
from pipelines.settings import OwlError


def facts_of(row: dict) -> dict:
    """What metrics see of an answer: the question's facts and the answer as its prediction."""
    return {**row["facts"], "prediction": row["answer"], "unit": row["unit"]}


def scored(benchmark: Benchmark, rows: list[dict]) -> list[dict]:
    """The rows with their scores. Each condition is a corpus of its own."""
    done = {}
    for condition in dict.fromkeys(row["condition"] for row in rows):
        some = [row for row in rows if row["condition"] == condition]
        for row, score in zip(some, benchmark.scores([facts_of(row) for row in some]), strict=True):
            done[id(row)] = score
    return [{**row, "score": done[id(row)]} for row in rows]


def score_predictions(name: str, lines: list[dict]) -> dict[str, Any]:
    """The metrics of raw predictions: lines of a question's facts with "prediction", as benchmarks' files name them."""
    benchmark = named(name)
    if not lines:
        raise OwlError("there are no predictions to score")
    try:
        rows = [{**line, "score": score} for line, score in zip(lines, benchmark.scores(lines), strict=True)]
        return benchmark.metrics(rows)
    except KeyError as error:
        raise OwlError(f"{name} needs {error.args[0]!r} in every line; the first has {', '.join(lines[0])}") from None


def summarize(benchmark: Benchmark, rows: list[dict]) -> dict[str, Any]:
    """The benchmark's metrics, the headline's 95 % interval, and for each condition the mean score by type of question,
    with intervals that resample whole units."""
    asked = [row for row in rows if row["condition"] == "picture"]
    graded = [row for row in asked if row["score"] is not None]
    metrics = metrics_of(benchmark, graded) if graded else {}
    return {
        "questions": len(asked),
        "graded": len(graded),
        "failed": sum(row["error"] is not None for row in asked),
        "metrics": metrics,
        "headline": headline(benchmark, graded, metrics) if graded else None,
        "scores": by_type(rows),
    }


def metrics_of(benchmark: Benchmark, rows: Sequence[dict]) -> dict[str, Any]:
    return benchmark.metrics([{**facts_of(row), "score": row["score"]} for row in rows])


def headline(benchmark: Benchmark, rows: list[dict], metrics: dict) -> dict[str, Any]:
    name = benchmark.headline
    if benchmark.recount:
        facts = [{**facts_of(row), "score": row["score"]} for row in rows]
        low, high = resamples(facts, lambda row: row["unit"], lambda some: benchmark.metrics(some)[name])
    else:
        scale = metrics[name] / max(1e-12, np.mean([row["score"] for row in rows])) if metrics[name] else 100.0
        low, high = (scale * end for end in interval(rows))
    return {"name": name, "value": metrics[name], "low": low, "high": high}


def interval(rows: Sequence[dict]) -> tuple[float, float]:
    return bootstrap_interval(np.array([row["score"] for row in rows]), np.array([row["unit"] for row in rows]))


def by_type(rows: list[dict]) -> dict[str, dict]:
    """condition → type → {n, accuracy, low, high}; "all" is every question, "all with pictures" those that have some,
    which is what the controls compare with."""
    out: dict[str, dict] = {}
    for condition in dict.fromkeys(row["condition"] for row in rows):
        some = [row for row in rows if row["condition"] == condition and row["score"] is not None]
        groups = {"all": some, "all with pictures": [row for row in some if shows(row)]}
        kinds = sorted({row["type"] for row in some})
        groups |= {kind: [row for row in some if row["type"] == kind] for kind in kinds if kind != "all"}
        for kind, members in groups.items():
            if members and not (kind == "all" and condition != "picture"):
                low, high = interval(members)
                mean = float(np.mean([row["score"] for row in members]))
                out.setdefault(condition, {})[kind] = {"n": len(members), "accuracy": mean, "low": low, "high": high}
    return out


def shows(row: dict) -> bool:
    return bool(row["pictures"]) or row["condition"] != "picture"


def to_table(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist([{**row, "facts": json.dumps(row["facts"])} for row in rows], schema=ANSWERS)


def read_results(output: str) -> tuple[dict, list[dict]]:
    """results.json and the answers of a finished evaluation. Raises OwlError where there is none."""
    if not storage.exists(f"{output}/results.json"):
        raise OwlError(f"no finished evaluation in {output!r}: it has no results.json")
    rows = storage.read_parquet(f"{output}/answers.parquet").to_pylist()
    return storage.read_json(f"{output}/results.json"), [{**row, "facts": json.loads(row["facts"])} for row in rows]


def compare(first: str, second: str, rounds: int = 10_000) -> tuple[dict[str, Any], list[tuple[dict, dict]]]:
    """Two models on the same questions: how often one answers better, and the difference of their mean scores (second -
    first) with a paired 95 % interval that resamples whole units; and the pairs of answers that one of them has better.
    Raises OwlError where the questions or the metric differ."""
    (one, left), (two, right) = read_results(first), read_results(second)
    for name in ("benchmark", "split_sha256"):
        if one[name] != two[name]:
            raise OwlError(f"{first} and {second} differ in {name}: {one[name]} and {two[name]}; nothing to compare")
    answers = {row["id"]: row for row in right if row["condition"] == "picture" and row["score"] is not None}
    graded = [row for row in left if row["condition"] == "picture" and row["score"] is not None]
    pairs = [(row, answers[row["id"]]) for row in graded if row["id"] in answers]
    if not pairs:
        raise OwlError(f"{first} and {second} have no graded answer in common")
    a, b = (np.array([pair[side]["score"] for pair in pairs]) for side in (0, 1))
    units = np.array([pair[0]["unit"] for pair in pairs])
    low, high = bootstrap_interval(b - a, units, rounds)
    found = {
        "benchmark": one["benchmark"],
        "first": {"model": one["model"], "decoding": one["decoding"], "mean": float(a.mean())},
        "second": {"model": two["model"], "decoding": two["decoding"], "mean": float(b.mean())},
        "questions": len(pairs),
        "only_first_better": int((a > b).sum()),
        "only_second_better": int((b > a).sum()),
        "difference": float((b - a).mean()),
        "low": low,
        "high": high,
    }
    return found, [pair for pair in pairs if pair[0]["score"] != pair[1]["score"]]
