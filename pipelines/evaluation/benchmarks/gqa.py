"""GQA: compositional questions made from scene graphs."""

from pipelines.evaluation.benchmarks.base import WORD, Benchmark, Question, ask, by, each, read_json


def read(folder: str) -> list[Question]:
    return [
        Question(
            key,
            ask(f"{row['question']} {WORD}"),
            [f"{folder}/images/{row['imageId']}.jpg"],
            {"question": row["question"], "answer": row["answer"], "kind": row["types"]["structural"]},
            row["types"]["structural"],
            row["imageId"],
        )
        for key, row in read_json(f"{folder}/testdev_balanced_questions.json").items()
    ]


BENCHMARK = Benchmark(
    version="gqa/1 exact match, lower case",
    about="12,578 questions of the balanced test-dev split (Hudson and Manning 2019).",
    source="https://cs.stanford.edu/people/dorarad/gqa/download.html",
    layout="testdev_balanced_questions.json images/",
    read=read,
    scores=each(lambda row: float(row["prediction"].strip().rstrip(".").lower() == row["answer"].lower())),
    metrics=by("kind"),
    published={
        "mPLUG-Owl2": 56.1,
        "LLaVA-1.5-7B": 62.0,
        "LLaVA-1.5-13B": 63.3,
        "InstructBLIP-7B": 49.2,
        "Qwen-VL-Chat": 57.5,
    },
)
