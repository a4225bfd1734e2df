"""MMStar: questions that cannot be answered without the picture, and are in no training set."""

from pipelines.evaluation.benchmarks.base import LETTER, LETTERS_RIGHT, Benchmark, Question, ask, by, read_parquets
from pipelines.evaluation.metrics import LETTERS


def read(folder: str) -> list[Question]:
    return [posed(row) for row in read_parquets(folder, "mmstar")]


def posed(row: dict) -> Question:
    picture = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
    facts = {"answer": row["answer"].strip(), "category": row["category"], "choices": list(LETTERS[:4])}
    text = f"{row['question']}\n{LETTER}"  # which holds "Options: A: …, B: …"
    return Question(str(row["index"]), ask(text), [picture], facts, row["category"], choices=tuple(LETTERS[:4]))


BENCHMARK = Benchmark(
    version="mmstar/1 accuracy of letters",
    about="1,500 questions in six capabilities (Chen et al. 2024).",
    source="https://huggingface.co/datasets/Lin-Chen/MMStar",
    layout="mmstar.parquet",
    read=read,
    scores=LETTERS_RIGHT,
    metrics=by("category"),
    published={"LLaVA-1.5-7B": 30.3, "LLaVA-1.5-13B": 32.8},
)
