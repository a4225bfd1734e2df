"""ChartQA: questions about charts, half of them written by people."""

from pipelines.evaluation.benchmarks.base import WORD, Benchmark, Question, ask, by, each, read_json
from pipelines.evaluation.metrics import relaxed_match

KINDS = ("human", "augmented")


def read(folder: str) -> list[Question]:
    return [
        Question(
            f"{kind}-{number}",
            ask(f"{row['query']} {WORD}"),
            [f"{folder}/test/png/{row['imgname']}"],
            {"question": row["query"], "answer": row["label"], "kind": kind},
            kind,
            row["imgname"],
        )
        for kind in KINDS
        for number, row in enumerate(read_json(f"{folder}/test/test_{kind}.json"))
    ]


BENCHMARK = Benchmark(
    version="chartqa/1 relaxed match at 5 %",
    about="2,500 questions of the test split (Masry et al. 2022).",
    source="https://github.com/vis-nlp/ChartQA",
    layout="test/test_human.json test/test_augmented.json test/png/",
    read=read,
    scores=each(lambda row: relaxed_match(row["prediction"], row["answer"])),
    metrics=by("kind"),
    max_new_tokens=32,
    published={"Qwen-VL-Chat": 66.3},
)
