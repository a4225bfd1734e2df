"""DocVQA: questions about scanned pages."""

from pipelines.evaluation.benchmarks.base import WORD, Benchmark, Question, ask, each, percent, read_json
from pipelines.evaluation.metrics import anls


def read(folder: str) -> list[Question]:
    return [
        Question(
            str(row["questionId"]),
            ask(f"{row['question']} {WORD}"),
            [f"{folder}/{row['image']}"],
            {"question": row["question"], "answers": row["answers"]},
            unit=row["image"],
        )
        for row in read_json(f"{folder}/val_v1.0_withQT.json")["data"]
    ]


BENCHMARK = Benchmark(
    version="docvqa/1 ANLS at 0.5",
    about="5,349 questions of the validation split (Mathew et al. 2021).",
    source="https://rrc.cvc.uab.es/?ch=17 (task 1)",
    layout="val_v1.0_withQT.json documents/",
    read=read,
    scores=each(lambda row: anls(row["prediction"], row["answers"])),
    metrics=lambda rows: {"ANLS": percent(rows)},
    headline="ANLS",
    max_new_tokens=32,
)
