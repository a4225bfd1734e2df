"""MMLU: four choices in 57 subjects, with five solved examples before each question."""

from pipelines import storage
from pipelines.evaluation.benchmarks.base import LETTERS_RIGHT, Benchmark, Question, ask, by, read_table
from pipelines.evaluation.metrics import LETTERS, lettered

NAMES = ("question", "A", "B", "C", "D", "answer")
SHOTS = 5


def read(folder: str) -> list[Question]:
    paths = storage.listing(f"{folder}/test", "_test.csv")
    if not paths:
        raise FileNotFoundError(f"{folder}/test/*_test.csv")
    return [question for path in paths for question in read_subject(folder, path)]


def read_subject(folder: str, path: str) -> list[Question]:
    subject = storage.name_of(path).removesuffix("_test.csv")
    solved = read_table(f"{folder}/dev/{subject}_dev.csv", ",", NAMES)[:SHOTS]
    about = subject.replace("_", " ")
    before = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    before += "".join(f"{shown(row)} {row['answer']}\n\n" for row in solved)
    rows = read_table(path, ",", NAMES)
    return [
        Question(
            f"{subject}-{number}",
            ask(before + shown(row), 0),
            [],
            {"answer": row["answer"], "choices": [row[letter] for letter in "ABCD"], "subject": subject},
            subject,
            choices=tuple(LETTERS[:4]),
        )
        for number, row in enumerate(rows)
    ]


def shown(row: dict) -> str:
    return f"{row['question']}\n{lettered([row[letter] for letter in 'ABCD'])}\nAnswer:"


BENCHMARK = Benchmark(
    version="mmlu/1 five examples, accuracy of letters",
    about="14,042 questions of the test split (Hendrycks et al. 2021), prompts as theirs.",
    source="https://github.com/hendrycks/test (data.tar)",
    layout="test/SUBJECT_test.csv dev/SUBJECT_dev.csv",
    read=read,
    scores=LETTERS_RIGHT,
    metrics=by("subject"),
    published={"mPLUG-Owl2": 53.4},
)
