"""TextVQA: questions about what is written in the picture."""

from pipelines.evaluation.benchmarks.base import WORD, Benchmark, Question, ask, each, read_json
from pipelines.evaluation.metrics import textvqa_accuracy

SOURCE = "https://textvqa.org/dataset"
ANNOTATIONS = "TextVQA_0.5.1_val.json"


def read(folder: str) -> list[Question]:
    return [textual(row, folder, f"{row['question']} {WORD}") for row in read_json(f"{folder}/{ANNOTATIONS}")["data"]]


def textual(row: dict, folder: str, text: str) -> Question:
    facts = {"question": row["question"], "answers": row["answers"]}
    picture = f"{folder}/train_images/{row['image_id']}.jpg"
    return Question(str(row["question_id"]), ask(text), [picture], facts, unit=row["image_id"])


BENCHMARK = Benchmark(
    version="textvqa/1 VQA accuracy, M4C normalization",
    about="5,000 questions of the validation split, ten answers each (Singh et al. 2019); no OCR tokens are shown.",
    source=SOURCE,
    layout=f"{ANNOTATIONS} train_images/",
    read=read,
    scores=each(lambda row: textvqa_accuracy(row["prediction"], row["answers"])),
    published={"mPLUG-Owl2": 54.3},
)
