"""NoCaps: captions of objects that COCO's captions never name."""

from pipelines.evaluation.benchmarks.base import Question, read_json
from pipelines.evaluation.benchmarks.captions import caption_benchmark, captioned


def read(folder: str) -> list[Question]:
    data = read_json(f"{folder}/nocaps_val_4500_captions.json")
    told: dict[int, list[str]] = {}
    for row in data["annotations"]:
        told.setdefault(row["image_id"], []).append(row["caption"])
    return [
        captioned(str(row["id"]), f"{folder}/images/{row['file_name']}", told[row["id"]], row.get("domain", "all"))
        for row in data["images"]
    ]


BENCHMARK = caption_benchmark(
    "nocaps",
    "One sentence about each of 4,500 photographs, in, near and out of COCO's domain (Agrawal et al. 2019).",
    "https://nocaps.org/download",
    "nocaps_val_4500_captions.json images/",
    read,
)
