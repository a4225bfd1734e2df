"""OK-VQA: questions that need knowledge from outside the picture."""

from pipelines.evaluation.benchmarks.base import Benchmark, Question, each
from pipelines.evaluation.benchmarks.vqav2 import read_vqa
from pipelines.evaluation.metrics import vqa_accuracy


def read(folder: str) -> list[Question]:
    return read_vqa(
        f"{folder}/OpenEnded_mscoco_val2014_questions.json",
        f"{folder}/mscoco_val2014_annotations.json",
        f"{folder}/val2014",
    )


BENCHMARK = Benchmark(
    version="okvqa/1 VQA accuracy, official normalization",
    about="5,046 questions of the validation split, ten answers each (Marino et al. 2019).",
    source="https://okvqa.allenai.org/download.html",
    layout="OpenEnded_mscoco_val2014_questions.json mscoco_val2014_annotations.json val2014/",
    read=read,
    scores=each(lambda row: vqa_accuracy(row["prediction"], row["answers"])),
    published={"mPLUG-Owl2": 57.7},
)
