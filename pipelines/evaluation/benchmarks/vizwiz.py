"""VizWiz-VQA: questions that blind people asked about photographs they took; some cannot be answered."""

from pipelines.evaluation.benchmarks.base import WORD, Benchmark, Question, ask, by, each, read_json
from pipelines.evaluation.metrics import vqa_accuracy

UNKNOWN = "When the provided information is insufficient, respond with 'Unanswerable'."


def read(folder: str) -> list[Question]:
    return [
        Question(
            row["image"],
            ask(f"{row['question']}\n{UNKNOWN}\n{WORD}"),
            [f"{folder}/val/{row['image']}"],
            {
                "question": row["question"],
                "answers": [each["answer"] for each in row["answers"]],
                "answer_type": row.get("answer_type", "other"),
            },
            row.get("answer_type", "other"),
            row["image"],
        )
        for row in read_json(f"{folder}/val.json")
    ]


BENCHMARK = Benchmark(
    version="vizwiz/1 VQA accuracy, official normalization",
    about="4,319 questions of the validation split, ten answers each; the papers' figures are of test, which only the "
    "challenge's server scores. Prompt: LLaVA-1.5's (Liu et al. 2023, appendix).",
    source="https://vizwiz.org/tasks-and-datasets/vqa/",
    layout="val.json val/",
    read=read,
    scores=each(lambda row: vqa_accuracy(row["prediction"].lower(), row["answers"])),
    metrics=by("answer_type"),
    published={
        "mPLUG-Owl2 (test)": 54.5,
        "LLaVA-1.5-7B (test-dev)": 50.0,
        "LLaVA-1.5-13B (test-dev)": 53.6,
        "InstructBLIP-7B (test-dev)": 34.5,
        "Qwen-VL-Chat (test-dev)": 38.9,
    },
)
