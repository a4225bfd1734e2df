"""TextVQA where the prompt also lists what an OCR program read, as LLaVA-1.5 was evaluated."""

from pipelines.evaluation.benchmarks.base import WORD, Benchmark, Question, each, read_json
from pipelines.evaluation.benchmarks.textvqa import ANNOTATIONS, SOURCE, textual
from pipelines.evaluation.metrics import textvqa_accuracy

TOKENS = "TextVQA_Rosetta_OCR_v0.2_val.json"


def read(folder: str) -> list[Question]:
    read_there = {row["image_id"]: row["ocr_tokens"] for row in read_json(f"{folder}/{TOKENS}")["data"]}

    def prompt(row: dict) -> str:
        tokens = ", ".join(read_there.get(row["image_id"], []))
        return f"{row['question'].capitalize()}\nReference OCR token: {tokens}\n{WORD}"

    return [textual(row, folder, prompt(row)) for row in read_json(f"{folder}/{ANNOTATIONS}")["data"]]


BENCHMARK = Benchmark(
    version="textvqa_ocr/1 VQA accuracy, M4C normalization",
    about="TextVQA's validation split with Rosetta's OCR tokens in the prompt (LLaVA-1.5, appendix).",
    source=SOURCE,
    layout=f"{ANNOTATIONS} {TOKENS} train_images/",
    read=read,
    scores=each(lambda row: textvqa_accuracy(row["prediction"], row["answers"])),
    published={"LLaVA-1.5-7B": 58.2, "LLaVA-1.5-13B": 61.3, "InstructBLIP-7B": 50.1, "Qwen-VL-Chat": 61.5},
)
