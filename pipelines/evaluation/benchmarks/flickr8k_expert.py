"""Flickr8k's expert judgements: how well caption metrics agree with people. It measures metrics, not models."""

from pipelines.evaluation.benchmarks.base import Benchmark
from pipelines.evaluation.captioning import caption_scores, kendall_tau

SHOWN = ("BLEU-1", "BLEU-4", "ROUGE-L", "METEOR", "CIDEr")


def agreement(rows: list[dict]) -> dict:
    """Kendall's tau-c, in percent, of each metric and the ratings. A caption stands once for each of its ratings, which
    CIDEr's word counts see as well, as in the CLIPScore paper (Hessel et al. 2021, table 1)."""
    rated = [(row, rating) for row in rows for rating in row["expert"]]
    corpus, each = caption_scores([row["candidate"] for row, _ in rated], [row["references"] for row, _ in rated])
    taus = {name: kendall_tau(each[name], [[rating] for _, rating in rated]) for name in SHOWN if name in each}
    return taus | {"tokenizer": corpus["tokenizer"]}


BENCHMARK = Benchmark(
    version="flickr8k_expert/1 Kendall's tau-c",
    about="5,664 pairs of picture and caption, each rated by three experts (Hodosh et al. 2013).",
    source="https://forms.illinois.edu/sec/1713398 (ExpertAnnotations.txt, Flickr8k.token.txt)",
    layout="predictions only: lines of candidate, references, expert",
    read=None,
    scores=lambda rows: [None] * len(rows),
    metrics=agreement,
    headline="CIDEr",
)
