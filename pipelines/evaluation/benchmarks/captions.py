"""What the captioning benchmarks share: one sentence a picture, held to people's by coco-caption's metrics."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.evaluation.benchmarks.base import Benchmark, Question, ask, read_json
from pipelines.evaluation.captioning import caption_scores
from pipelines.evaluation.metrics import mean

PROMPT = "Provide a one-sentence caption for the provided image."
KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/"


def karpathy(path: str, pictures: str) -> list[Question]:
    """The test split of Karpathy's JSON: its pictures, below the folder ``pictures``, with all their sentences."""
    return [
        captioned(
            str(row.get("cocoid", row["imgid"])),
            "/".join(part for part in (pictures, row.get("filepath", ""), row["filename"]) if part),
            [sentence["raw"] for sentence in row["sentences"]],
        )
        for row in read_json(path)["images"]
        if row["split"] == "test"
    ]


def captioned(id: str, picture: str, references: list[str], kind: str = "all") -> Question:
    return Question(id, ask(PROMPT), [picture], {"image_id": id, "references": references}, kind, id)


def said(row: dict) -> str:
    return row["candidate"] if "candidate" in row else row["prediction"]


def each_cider(rows: list[dict]) -> list[float | None]:
    """Each caption's CIDEr, whose mean is the corpus's."""
    return list(caption_scores([said(row) for row in rows], [row["references"] for row in rows])[1]["CIDEr"])


def corpus(rows: list[dict]) -> dict:
    """All caption metrics; of each set by itself where rows name theirs."""
    if sets := sorted({row["set"] for row in rows if "set" in row}):
        return {name: of_all([row for row in rows if row["set"] == name]) for name in sets}
    return of_all(rows)


def of_all(rows: list[dict]) -> dict:
    found = caption_scores([said(row) for row in rows], [row["references"] for row in rows])[0]
    clip = [name for name in ("CLIPScore", "RefCLIPScore") if name in rows[0]]
    return {**{name: mean([row[name] for row in rows]) for name in clip}, **found}


def caption_benchmark(name: str, about: str, source: str, layout: str, read, published: Mapping[str, float] = {}):
    return Benchmark(
        version=f"{name}/1 coco-caption on PTB tokens",
        about=about,
        source=source,
        layout=layout,
        read=read,
        scores=each_cider,
        metrics=corpus,
        headline="CIDEr",
        most=1,
        max_new_tokens=60,
        min_new_tokens=8,
        published=published,
    )
