"""VQAv2: open questions about COCO's photographs, ten people's answers each."""

from pipelines.evaluation.benchmarks.base import WORD, Benchmark, Question, ask, by, each, read_json
from pipelines.evaluation.metrics import vqa_accuracy


def read_vqa(questions: str, annotations: str, pictures: str) -> list[Question]:
    """The layout of the VQA challenge: questions and annotations in two files, pictures by COCO's numbers."""
    told = {row["question_id"]: row for row in read_json(annotations)["annotations"]}
    return [
        Question(
            str(row["question_id"]),
            ask(f"{row['question']} {WORD}"),
            [f"{pictures}/COCO_val2014_{row['image_id']:012d}.jpg"],
            {
                "question": row["question"],
                "answers": [each["answer"] for each in told[row["question_id"]]["answers"]],
                "answer_type": told[row["question_id"]].get("answer_type", "other"),
            },
            told[row["question_id"]].get("answer_type", "other"),
            str(row["image_id"]),
        )
        for row in read_json(questions)["questions"]
    ]


def read(folder: str) -> list[Question]:
    return read_vqa(
        f"{folder}/v2_OpenEnded_mscoco_val2014_questions.json",
        f"{folder}/v2_mscoco_val2014_annotations.json",
        f"{folder}/val2014",
    )


BENCHMARK = Benchmark(
    version="vqav2/1 VQA accuracy, official normalization",
    about="214,354 questions of the validation split, whose answers are public; the papers' figures are of test-dev, "
    "which only the challenge's server scores.",
    source="https://visualqa.org/download.html",
    layout="v2_OpenEnded_mscoco_val2014_questions.json v2_mscoco_val2014_annotations.json val2014/",
    read=read,
    scores=each(lambda row: vqa_accuracy(row["prediction"], row["answers"])),
    metrics=by("answer_type"),
    published={
        "mPLUG-Owl2 (test-dev)": 79.4,
        "LLaVA-1.5-7B (test-dev)": 78.5,
        "LLaVA-1.5-13B (test-dev)": 80.0,
        "Qwen-VL-Chat (test-dev)": 78.2,
        "BLIP-2 (test-dev)": 65.0,
    },
)
