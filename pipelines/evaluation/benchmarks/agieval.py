"""AGIEval: exams that people take, in English; questions with choices."""

from pipelines import storage
from pipelines.evaluation.benchmarks.base import LETTER, LETTERS_RIGHT, Benchmark, Question, ask, by, read_lines
from pipelines.evaluation.metrics import LETTERS

TASKS = ("aqua-rat", "logiqa-en", "lsat-ar", "lsat-lr", "lsat-rc", "sat-en", "sat-en-without-passage", "sat-math")


def read(folder: str) -> list[Question]:
    present = [task for task in TASKS if storage.exists(f"{folder}/data/v1_1/{task}.jsonl")]
    if not present:
        raise FileNotFoundError(f"{folder}/data/v1_1/{TASKS[0]}.jsonl")
    return [
        posed(f"{task}-{number}", row, task)
        for task in present
        for number, row in enumerate(read_lines(f"{folder}/data/v1_1/{task}.jsonl"))
    ]


def posed(id: str, row: dict, task: str) -> Question:
    choices = [option.removeprefix(f"({letter})") for letter, option in zip(LETTERS, row["options"], strict=False)]
    passage = f"{row['passage']}\n" if row.get("passage") else ""
    text = f"{passage}{row['question']}\n{chr(10).join(row['options'])}\n{LETTER}"
    facts = {"answer": row["label"], "choices": choices, "task": task}
    return Question(id, ask(text, 0), [], facts, task, choices=tuple(LETTERS[: len(choices)]))


BENCHMARK = Benchmark(
    version="agieval/1 no examples, accuracy of letters",
    about="Eight English tasks with choices (Zhong et al. 2023); those are asked whose files are there.",
    source="https://github.com/ruixiangcui/AGIEval",
    layout="data/v1_1/TASK.jsonl",
    read=read,
    scores=LETTERS_RIGHT,
    metrics=by("task"),
    published={"mPLUG-Owl2": 32.7},
)
