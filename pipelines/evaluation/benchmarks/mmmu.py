"""MMMU: college exams in thirty subjects, with pictures among the words."""

import ast
import re

from pipelines import storage
from pipelines.evaluation.benchmarks.base import LETTER, WORD, Benchmark, Question, by, each, read_parquets
from pipelines.evaluation.metrics import LETTERS, chosen, lettered, open_match


def read(folder: str) -> list[Question]:
    subjects = [storage.name_of(path) for path in storage.folders(folder)]
    rows = [(subject, row) for subject in subjects for row in read_parquets(f"{folder}/{subject}", "validation")]
    if not rows:
        raise FileNotFoundError(f"{folder}/*/validation-*.parquet")
    return [posed(subject, row) for subject, row in rows]


def posed(subject: str, row: dict) -> Question:
    options = ast.literal_eval(row["options"]) if isinstance(row["options"], str) else row["options"]
    several = row["question_type"] == "multiple-choice"
    text = row["question"] + (f"\n{lettered(options)}\n{LETTER}" if several else f" {WORD}")
    content: list[dict] = []
    pictures = []
    for number, piece in enumerate(re.split(r"<image (\d)>", text)):
        if number % 2:
            content.append({"type": "image"})
            pictures.append(row[f"image_{piece}"]["bytes"])
        elif piece:
            content.append({"type": "text", "text": piece})
    accepted = [row["answer"]]
    if not several and row["answer"].startswith("["):
        accepted = [str(one) for one in ast.literal_eval(row["answer"])]
    facts = {"answers": accepted, "choices": options if several else [], "subject": subject}
    letters = tuple(LETTERS[: len(options)]) if several else ()
    return Question(row["id"], [{"role": "user", "content": content}], pictures, facts, subject, choices=letters)


def score(row: dict) -> float:
    if row["choices"]:
        return float(chosen(row["prediction"], row["choices"]) == row["answers"][0])
    return open_match(row["prediction"], row["answers"])


BENCHMARK = Benchmark(
    version="mmmu/1 letters; numbers and words of open questions",
    about="900 questions of the validation split (Yue et al. 2023). A letter that cannot be told counts as wrong, "
    "where the authors' parser draws one by chance.",
    source="https://huggingface.co/datasets/MMMU/MMMU",
    layout="SUBJECT/validation-*.parquet",
    read=read,
    scores=each(score),
    metrics=by("subject"),
    max_new_tokens=20,
    published={"mPLUG-Owl2": 32.7, "LLaVA-1.5-13B": 36.4, "Qwen-VL-Chat": 35.9},
)
