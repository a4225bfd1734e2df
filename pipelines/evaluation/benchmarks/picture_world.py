"""The demo's held-out questions. An answer that reasons ends in "…, so X"; X is what counts."""

from pipelines.evaluation.benchmarks.base import Benchmark, Question, each, read_lines
from pipelines.evaluation.metrics import exact_match


def read(folder: str) -> list[Question]:
    return [
        Question(
            row["id"],
            row["messages"],
            [f"{folder}/{name}" for name in row["pictures"]],
            {"answer": row["answer"]},
            row["type"],
            " ".join(row["pictures"]),
        )
        for row in read_lines(f"{folder}/questions.jsonl")
    ]


BENCHMARK = Benchmark(
    version="picture_world/1 exact match of the final answer",
    about="Combinations of size, colour and shape that the demo's world never showed in training.",
    source="`owl demo`, which writes it below DIR/world/heldout",
    layout="questions.jsonl pictures/",
    read=read,
    scores=each(lambda row: exact_match(row["prediction"], row["answer"])),
    max_new_tokens=32,
)
