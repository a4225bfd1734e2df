"""Flickr30k captions: 1,000 photographs of Karpathy's test split, five captions each."""

from pipelines.evaluation.benchmarks.captions import KARPATHY, caption_benchmark, karpathy

BENCHMARK = caption_benchmark(
    "flickr30k",
    "One sentence about each of 1,000 photographs; Karpathy's test split, as in mPLUG-Owl2, table 1.",
    f"{KARPATHY} (dataset_flickr30k.json) and https://shannon.cs.illinois.edu/DenotationGraph/",
    "dataset_flickr30k.json flickr30k-images/",
    lambda folder: karpathy(f"{folder}/dataset_flickr30k.json", f"{folder}/flickr30k-images"),
    {"mPLUG-Owl2": 0.851},
)
