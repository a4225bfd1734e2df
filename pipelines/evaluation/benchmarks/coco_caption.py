"""COCO captions: 5,000 photographs of Karpathy's test split, five captions each."""

from pipelines.evaluation.benchmarks.captions import KARPATHY, caption_benchmark, karpathy

BENCHMARK = caption_benchmark(
    "coco_caption",
    "One sentence about each of 5,000 photographs; Karpathy's test split, as in mPLUG-Owl2, table 1.",
    f"{KARPATHY} (dataset_coco.json) and https://cocodataset.org/#download (val2014)",
    "dataset_coco.json val2014/",
    lambda folder: karpathy(f"{folder}/dataset_coco.json", folder),
    {"mPLUG-Owl2": 1.373},
)
