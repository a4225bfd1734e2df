"""ScienceQA: school questions with several choices, half of them with a picture."""

from pipelines.evaluation.benchmarks.base import LETTER, Benchmark, Question, ask, each, percent, read_json
from pipelines.evaluation.metrics import LETTERS, lettered, scienceqa_letter


def read(folder: str) -> list[Question]:
    problems = read_json(f"{folder}/problems.json")
    return [posed(key, problems[key], folder) for key in read_json(f"{folder}/pid_splits.json")["test"]]


def posed(key: str, row: dict, folder: str) -> Question:
    context = f"Context: {row['hint']}\n" if row.get("hint") else ""
    text = f"{context}{row['question']}\n{lettered(row['choices'])}\n{LETTER}"
    pictures = [f"{folder}/test/{key}/{row['image']}"] if row["image"] else []
    facts = {"question_id": key, "answer": LETTERS[row["answer"]], "is_multimodal": bool(pictures)}
    kind = "with a picture" if pictures else "text only"
    return Question(key, ask(text, len(pictures)), pictures, facts, kind, choices=tuple(LETTERS[: len(row["choices"])]))


def accuracies(rows: list[dict]) -> dict:
    shown = [row for row in rows if row["is_multimodal"]]
    return {"all": percent(rows), "image_subset": percent(shown), "n_image": len(shown)}


BENCHMARK = Benchmark(
    version="scienceqa/1 letters as LLaVA's eval_science_qa.py reads them",
    about="4,241 questions of the test split, 2,017 of them with a picture (SciQA-IMG; Lu et al. 2022).",
    source="https://scienceqa.github.io/#download",
    layout="problems.json pid_splits.json test/ID/image.png",
    read=read,
    scores=each(lambda row: float(scienceqa_letter(row["prediction"]) == row["answer"])),
    metrics=accuracies,
    headline="image_subset",
    recount=True,
    published={
        "mPLUG-Owl2": 68.7,
        "LLaVA-1.5-7B": 66.8,
        "LLaVA-1.5-13B": 71.6,
        "InstructBLIP-7B": 60.5,
        "Qwen-VL-Chat": 68.2,
    },
)
