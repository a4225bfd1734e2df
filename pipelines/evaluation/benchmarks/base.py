"""What a benchmark is, and how its official files are read."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines import storage
from pipelines.evaluation.metrics import chosen, mean

WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
"""The prompts of mPLUG-Owl2's evaluation scripts and of LLaVA-1.5's."""


@dataclass(frozen=True)
class Question:
    id: str
    messages: list[dict]
    """The conversation up to where the answer is due."""
    pictures: Sequence[str | bytes]
    """Paths, or the encoded pictures themselves where the official file holds them, in reading order."""
    facts: dict[str, Any]
    """What the metric needs to know, by the names of the official file."""
    type: str = "all"
    """Kind of question that is also scored by itself."""
    unit: str = ""
    """What it shares with others, such as a picture: an interval resamples whole units. "" stands alone."""
    choices: tuple[str, ...] = ()
    """Answers one of which is right, where likelihood can choose among them."""
    follows: str = ""
    """Id of the question whose turn in the conversation comes before; its answer is shown."""


Scores = Callable[[list[dict]], list[float | None]]
Metrics = Callable[[list[dict]], dict[str, Any]]


def each(score: Callable[[dict], float | None]) -> Scores:
    """Rows scored one by one."""
    return lambda rows: [score(row) for row in rows]


LETTERS_RIGHT = each(lambda row: float(chosen(row["prediction"], row["choices"]) == row["answer"]))
"""Scores of questions with "choices", whose "answer" is a letter."""


def percent_right(rows: list[dict]) -> dict[str, Any]:
    return {"accuracy": percent(rows)}


def percent(rows: Sequence[dict]) -> float:
    """Mean score of rows, in percent. Rows without a score are left out."""
    return 100 * mean([row["score"] for row in rows if row["score"] is not None])


def by(name: str, metric: Metrics = percent_right) -> Metrics:
    """The accuracy of all, and of rows that share a field."""

    def metrics(rows: list[dict]) -> dict[str, Any]:
        kinds = sorted({str(row[name]) for row in rows})
        parts = {kind: percent([row for row in rows if str(row[name]) == kind]) for kind in kinds}
        return metric(rows) | (parts if len(kinds) > 1 else {})

    return metrics


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """How a language model grades an answer."""

    version: str
    prompt: str
    """With places for the question's facts and {prediction}."""
    shows_pictures: bool = False
    """Whether the judge sees the question's pictures."""
    read: Callable[[str], dict | None]
    """The judge's words → what they add to the facts, by the names that the scores are read from; None where they hold
    no grade."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark. ``scores`` and ``metrics`` take rows of a question's facts with its "prediction"; metrics' rows
    have a "score", too."""

    version: str
    """Names prompt and metric; a new one whenever a figure could change."""
    about: str
    """What is asked and how it is scored, with the source of the protocol."""
    source: str
    """Where its owners publish the data."""
    layout: str
    """The files it reads below the folder that the user names."""
    read: Callable[[str], list[Question]] | None
    """None where there is nothing to ask a model."""
    scores: Scores
    metrics: Metrics = percent_right
    headline: str = "accuracy"
    """The metric that tables show."""
    recount: bool = False
    """Whether the headline is no mean of the scores, so that intervals compute it anew."""
    most: float = 100
    """The best headline there can be."""
    max_new_tokens: int = 10
    min_new_tokens: int = 0
    published: Mapping[str, float] = field(default_factory=dict)
    """System → headline, as its authors or the benchmark's report it."""
    rubric: Rubric | None = None
    """For answers that no rule can score."""
    abilities: Callable[[dict], dict[str, float]] | None = None
    """Metrics → ability → share of what there is to get; without it, types of questions stand for abilities."""


def ask(text: str, pictures: int = 1) -> list[dict]:
    """A user's turn: pictures, then words."""
    return [{"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}]


def read_json(path: str) -> Any:
    return storage.read_json(path)


def read_lines(path: str) -> list[dict]:
    """A file of JSON lines."""
    with storage.open_read(path) as file:
        return [json.loads(line) for line in file if line.strip()]


def read_table(path: str, separator: str, names: Sequence[str] | None = None) -> list[dict]:
    """A CSV or TSV file; ``names`` where it has no line of them."""
    with storage.open_read(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        csv.field_size_limit(1 << 28)  # MMBench's pictures stand in its fields
        return list(csv.DictReader(text, fieldnames=names, delimiter=separator))


def read_parquets(folder: str, beginning: str = "") -> list[dict]:
    """The rows of a folder's Parquet files whose names begin so. Raises FileNotFoundError where there are none."""
    paths = [p for p in storage.listing(folder, ".parquet") if storage.name_of(p).startswith(beginning)]
    if not paths:
        raise FileNotFoundError(f"{folder}/{beginning}*.parquet")
    return [row for path in paths for row in storage.read_parquet(path).to_pylist()]


def from_base64(text: str) -> bytes:
    return base64.b64decode(text)
