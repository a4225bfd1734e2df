"""MathVista: mathematics in pictures; numbers, words and choices."""

import re

from pipelines.evaluation.benchmarks.base import Benchmark, Question, ask, by, each, percent_right, read_parquets
from pipelines.evaluation.metrics import chosen, mathvista_value

KEPT = ("question", "choices", "question_type", "answer_type", "precision", "answer")


def read(folder: str) -> list[Question]:
    return [posed(row) for row in read_parquets(f"{folder}/data", "testmini")]


def posed(row: dict) -> Question:
    facts = {name: row[name] for name in KEPT} | {"task": row["metadata"]["task"]}
    picture = row["decoded_image"]["bytes"]
    return Question(row["pid"], ask(row["query"]), [picture], facts, row["metadata"]["task"], row["image"])


def extracted(row: dict) -> str:
    """What a language model extracted, where one was asked; else the choice named, or the last number said."""
    if row.get("extraction") is not None:
        return str(row["extraction"])
    if row["question_type"] == "multi_choice":
        letter = chosen(row["prediction"], row["choices"])
        return f"({letter})" if letter else row["prediction"]
    numbers = re.findall(r"-?\d+(?:\.\d+)?", row["prediction"].replace(",", ""))
    return numbers[-1] if numbers and row["answer_type"] != "list" else row["prediction"]


def score(row: dict) -> float:
    value = mathvista_value(extracted(row), row)
    return float(value is not None and value.strip() == str(row["answer"]).strip())


BENCHMARK = Benchmark(
    version="mathvista/1 the authors' calculate_score.py; answers extracted by rule unless a model did",
    about="1,000 questions of testmini (Lu et al. 2023). Published figures had answers extracted by GPT-4.",
    source="https://huggingface.co/datasets/AI4Math/MathVista",
    layout="data/testmini-*.parquet",
    read=read,
    scores=each(score),
    metrics=lambda rows: by("task")(rows) if "task" in rows[0] else percent_right(rows),
    max_new_tokens=256,
    published={"mPLUG-Owl": 22.2, "LLaVA-1.5-13B": 27.6},
)
