"""SEED-Bench's questions about pictures."""

from pipelines.evaluation.benchmarks.base import LETTER, LETTERS_RIGHT, Benchmark, Question, ask, by, read_json
from pipelines.evaluation.metrics import LETTERS, lettered


def read(folder: str) -> list[Question]:
    data = read_json(f"{folder}/SEED-Bench.json")
    kinds = {number: name for name, number in data["question_type"].items()}
    return [
        posed(row, folder, kinds[row["question_type_id"]]) for row in data["questions"] if row["data_type"] == "image"
    ]


def posed(row: dict, folder: str, kind: str) -> Question:
    choices = [row[f"choice_{letter}"] for letter in "abcd"]
    facts = {"question": row["question"], "answer": row["answer"], "choices": choices, "kind": kind}
    text = f"{row['question']}\n{lettered(choices)}\n{LETTER}"
    picture = f"{folder}/SEED-Bench-image/{row['data_id']}"
    return Question(str(row["question_id"]), ask(text), [picture], facts, kind, row["data_id"], tuple(LETTERS[:4]))


BENCHMARK = Benchmark(
    version="seed_bench/1 accuracy of letters, pictures only",
    about="14,233 questions about pictures in nine dimensions (Li et al. 2023). The papers' figures of Owl include "
    "videos; LLaVA-1.5's of pictures alone are 66.1 and 68.2.",
    source="https://huggingface.co/datasets/AILab-CVC/SEED-Bench",
    layout="SEED-Bench.json SEED-Bench-image/",
    read=read,
    scores=LETTERS_RIGHT,
    metrics=by("kind"),
    published={
        "mPLUG-Owl2 (with videos)": 57.8,
        "mPLUG-Owl (with videos)": 34.0,
        "LLaVA-1.5-7B": 66.1,
        "LLaVA-1.5-13B": 68.2,
    },
)
