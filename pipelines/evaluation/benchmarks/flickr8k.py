"""Flickr8k captions: 1,000 photographs of Karpathy's test split, five captions each."""

from pipelines.evaluation.benchmarks.captions import KARPATHY, caption_benchmark, karpathy

BENCHMARK = caption_benchmark(
    "flickr8k",
    "One sentence about each of 1,000 photographs; Karpathy's test split.",
    f"{KARPATHY} (dataset_flickr8k.json) and https://forms.illinois.edu/sec/1713398",
    "dataset_flickr8k.json Flicker8k_Dataset/",
    lambda folder: karpathy(f"{folder}/dataset_flickr8k.json", f"{folder}/Flicker8k_Dataset"),
)
