"""POPE: does a model see objects that are not there? Yes and no about COCO's photographs, in three splits."""

from pipelines.evaluation.benchmarks.base import WORD, Benchmark, Question, ask, each, read_lines
from pipelines.evaluation.metrics import found, mean, pope_yes

SPLITS = ("random", "popular", "adversarial")


def read(folder: str) -> list[Question]:
    return [
        Question(
            f"{split}-{row['question_id']}",
            ask(f"{row['text']} {WORD}"),
            [f"{folder}/val2014/{row['image']}"],
            {"image": row["image"], "question": row["text"], "label": row["label"], "split": split},
            split,
            row["image"],
        )
        for split in SPLITS
        for row in read_lines(f"{folder}/coco_pope_{split}.json")
    ]


def counted(rows: list[dict]) -> dict:
    """F1 of "yes" and what it is made of. Of several splits: the means, as tables show them, and each by itself."""
    splits = {split: [row for row in rows if row.get("split") == split] for split in SPLITS}
    parts = {split: of_split(some) for split, some in splits.items() if some}
    if not parts:
        return of_split(rows)
    return {name: mean([part[name] for part in parts.values()]) for name in next(iter(parts.values()))} | parts


def of_split(rows: list[dict]) -> dict:
    return found([row["label"] == "yes" for row in rows], [pope_yes(row["prediction"]) for row in rows])


BENCHMARK = Benchmark(
    version="pope/1 F1 of yes, as the authors' evaluate.py reads answers",
    about="2,910 + 3,000 + 3,000 questions about 500 photographs (Li et al. 2023). Labels were revised since: "
    "published figures hold for those of commit e3e3926.",
    source="https://github.com/RUCAIBox/POPE (output/coco)",
    layout="coco_pope_random.json coco_pope_popular.json coco_pope_adversarial.json val2014/",
    read=read,
    scores=each(lambda row: float(pope_yes(row["prediction"]) == (row["label"] == "yes"))),
    metrics=counted,
    headline="f1",
    recount=True,
    published={"LLaVA-1.5-7B": 85.9, "LLaVA-1.5-13B": 85.9, "BLIP-2": 85.3, "InstructBLIP-13B": 78.9},
)
