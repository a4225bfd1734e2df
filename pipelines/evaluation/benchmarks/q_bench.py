"""Q-Bench (perception): what a model sees of a picture's quality."""

from pipelines.evaluation.benchmarks.base import LETTER, LETTERS_RIGHT, Benchmark, Question, ask, by, read_json
from pipelines.evaluation.metrics import LETTERS, lettered

KINDS = ("yes-no", "what", "how")
CONCERNS = ("distortion", "other", "in-context distortion", "in-context other")


def read(folder: str) -> list[Question]:
    return [posed(number, row, folder) for number, row in enumerate(read_json(f"{folder}/llvisionqa_dev.json"))]


def posed(number: int, row: dict, folder: str) -> Question:
    choices = row["candidates"]
    facts = {
        "question": row["question"],
        "choices": choices,
        "answer": LETTERS[choices.index(row["correct_ans"])],
        "kind": KINDS[int(row["type"])],
        "concern": CONCERNS[int(row["concern"])],
    }
    text = f"{row['question']}\n{lettered(choices)}\n{LETTER}"
    picture, letters = f"{folder}/images/{row['img_path']}", tuple(LETTERS[: len(choices)])
    return Question(str(number), ask(text), [picture], facts, facts["kind"], row["img_path"], letters)


BENCHMARK = Benchmark(
    version="q_bench/1 accuracy of letters",
    about="1,495 questions of LLVisionQA's development split (Wu et al. 2023).",
    source="https://github.com/Q-Future/Q-Bench",
    layout="llvisionqa_dev.json images/",
    read=read,
    scores=LETTERS_RIGHT,
    metrics=by("kind"),
    published={"mPLUG-Owl2": 62.9, "mPLUG-Owl": 58.9},
)
