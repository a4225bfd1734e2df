"""ARC-Challenge: school science that word statistics do not solve."""

from pipelines.evaluation.benchmarks.base import LETTER, LETTERS_RIGHT, Benchmark, Question, ask, read_lines
from pipelines.evaluation.metrics import LETTERS, lettered

SOURCE = "https://allenai.org/data/arc"


def read_arc(path: str) -> list[Question]:
    return [posed(row) for row in read_lines(path)]


def posed(row: dict) -> Question:
    choices = [choice["text"] for choice in row["question"]["choices"]]
    labels = [choice["label"] for choice in row["question"]["choices"]]  # letters, or in some questions numbers
    facts = {"answer": LETTERS[labels.index(row["answerKey"])], "choices": choices}
    text = f"{row['question']['stem']}\n{lettered(choices)}\n{LETTER}"
    return Question(row["id"], ask(text, 0), [], facts, choices=tuple(LETTERS[: len(choices)]))


BENCHMARK = Benchmark(
    version="arc_challenge/1 accuracy of letters",
    about="1,172 questions of the test split (Clark et al. 2018).",
    source=SOURCE,
    layout="ARC-Challenge/ARC-Challenge-Test.jsonl",
    read=lambda folder: read_arc(f"{folder}/ARC-Challenge/ARC-Challenge-Test.jsonl"),
    scores=LETTERS_RIGHT,
    published={"mPLUG-Owl2": 65.8},
)
