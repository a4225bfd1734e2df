"""The demo's held-out questions: ``questions.jsonl`` and the pictures it names, as `owl demo` writes them.

Metric: exact match of the final answer, where an answer that reasons ends in "…, so X".
"""

from __future__ import annotations

import json

from pipelines import storage
from pipelines.evaluation.metrics import Question, exact_match
from pipelines.settings import OwlError

VERSION = "picture_world/1 exact-match-of-final-answer"
score = exact_match


def read(folder: str) -> list[Question]:
    path = f"{folder}/questions.jsonl"
    if not storage.exists(path):
        raise OwlError(f"no questions.jsonl in {folder}: owl demo writes it, below DIR/world/heldout")
    with storage.open_read(path) as file:
        rows = [json.loads(line) for line in file]
    return [
        Question(
            row["id"], row["type"], row["messages"], [f"{folder}/{name}" for name in row["pictures"]], row["answer"]
        )
        for row in rows
    ]
