"""Questions → the batches of conversations that are asked, under each condition. Pure: a rerun plans the same."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pipelines.evaluation.benchmarks.base import Question
from pipelines.settings import OwlError

CONDITIONS = ("picture", "wrong picture", "no picture")
"""The question as it is, and the two controls."""


def sample(questions: list[Question], limit: int) -> list[Question]:
    """``limit`` of the questions at equal distances; conversations stay whole."""
    if not limit or limit >= len(questions):
        return questions
    keep = {questions[number * len(questions) // limit].id for number in range(limit)}
    follows = {question.id: question.follows for question in questions}
    for id in [*keep]:
        while id := follows[id]:
            keep.add(id)
    return [question for question in questions if question.id in keep]


def plan(questions: list[Question], batch_size: int, controls: bool) -> list[dict]:
    """Batches of conversations: [{"name", "condition", "items": [[turn, …]]}], the longest first. A turn is a question
    as a dict; most conversations have one."""
    batches = []
    for condition in CONDITIONS if controls else CONDITIONS[:1]:
        items = conversations(shown(questions, condition))
        items.sort(key=lambda turns: (-sum(len(t["pictures"]) for t in turns), -length(turns), turns[0]["id"]))
        for start in range(0, len(items), batch_size):
            name = f"{condition.replace(' ', '-')}-{start // batch_size:06d}"
            batches.append({"name": name, "condition": condition, "items": items[start : start + batch_size]})
    return batches


def length(turns: list[dict]) -> int:
    return sum(len(json.dumps(turn["messages"])) for turn in turns)


def conversations(items: list[dict]) -> list[list[dict]]:
    """Turns that follow each other, together."""
    chains: dict[str, list[dict]] = {}
    for item in items:
        chain = chains[item["follows"]] if item["follows"] else []
        chain.append(item)
        chains[item["id"]] = chain
    return list({id(chain): chain for chain in chains.values()}.values())


def shown(questions: list[Question], condition: str) -> list[dict]:
    """Questions as they are asked under a condition; those that need no picture are left out of the controls."""
    same_number: dict[int, list[Question]] = {}
    for question in questions:
        same_number.setdefault(len(question.pictures), []).append(question)
    items = []
    for place, question in enumerate(questions):
        pictures, messages = list(question.pictures), question.messages
        if condition != "picture" and not pictures:
            continue
        if condition == "wrong picture":
            others = same_number[len(pictures)]
            turned = (list(others[(place * 7919 + step) % len(others)].pictures) for step in range(len(others)))
            other = next((shown for shown in turned if shown != pictures), None)
            if other is None:  # there is one picture only
                continue
            pictures = other
        elif condition == "no picture":
            pictures = []
            messages = [{**m, "content": without_pictures(m["content"])} for m in messages]
        fields = {name: getattr(question, name) for name in ("id", "type", "facts", "unit", "choices", "follows")}
        items.append({**fields, "messages": messages, "pictures": pictures})
    return items


def without_pictures(content: str | list[dict]) -> str | list[dict]:
    return content if isinstance(content, str) else [part for part in content if part["type"] == "text"]


def refuse_without_choices(questions: Sequence[Question]) -> None:
    """Raises OwlError where a question has no choices whose likelihood could be compared."""
    if open_ones := [question.id for question in questions if not question.choices]:
        some = f"{len(open_ones)} questions have none, such as {open_ones[0]!r}"
        raise OwlError(f"answers=likelihood needs choices, and {some}")
