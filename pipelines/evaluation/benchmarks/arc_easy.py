"""ARC-Easy: the rest of its school science."""

from pipelines.evaluation.benchmarks.arc_challenge import SOURCE, read_arc
from pipelines.evaluation.benchmarks.base import LETTERS_RIGHT, Benchmark

BENCHMARK = Benchmark(
    version="arc_easy/1 accuracy of letters",
    about="2,376 questions of the test split (Clark et al. 2018).",
    source=SOURCE,
    layout="ARC-Easy/ARC-Easy-Test.jsonl",
    read=lambda folder: read_arc(f"{folder}/ARC-Easy/ARC-Easy-Test.jsonl"),
    scores=LETTERS_RIGHT,
    published={"mPLUG-Owl2": 79.9},
)
