"""BIG-Bench Hard: 27 tasks, each with three examples that are thought through."""

import re

from pipelines import storage
from pipelines.evaluation.benchmarks.base import Benchmark, Question, ask, by, each, read_json


def read(folder: str) -> list[Question]:
    paths = storage.listing(f"{folder}/bbh", ".json")
    if not paths:
        raise FileNotFoundError(f"{folder}/bbh/*.json")
    return [question for path in paths for question in read_task(folder, path)]


def read_task(folder: str, path: str) -> list[Question]:
    task = storage.name_of(path).removesuffix(".json")
    before = storage.read_bytes(f"{folder}/cot-prompts/{task}.txt").decode().partition("-----\n")[2]
    return [
        Question(
            f"{task}-{number}",
            ask(f"{before}\n\nQ: {row['input']}\nA: Let's think step by step.", 0),
            [],
            {"answer": row["target"], "task": task},
            task,
        )
        for number, row in enumerate(read_json(path)["examples"])
    ]


def concluded(text: str) -> str:
    told = re.findall(r"answer is (.*?)(?:\.(?:\s|$)|\n|$)", text.partition("\nQ:")[0])
    return (told[-1] if told else text).strip().strip(".")


BENCHMARK = Benchmark(
    version="bbh/1 exact match after 'the answer is'",
    about="6,511 examples of 27 tasks, three examples thought through before each (Suzgun et al. 2022).",
    source="https://github.com/suzgunmirac/BIG-Bench-Hard",
    layout="bbh/TASK.json cot-prompts/TASK.txt",
    read=read,
    scores=each(lambda row: float(concluded(row["prediction"]) == row["answer"].strip().strip("."))),
    metrics=by("task"),
    max_new_tokens=512,
    published={"mPLUG-Owl2": 45.0},
)
