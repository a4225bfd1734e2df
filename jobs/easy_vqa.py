"""`owl bench easy-vqa`: a small Owl trained on easy-VQA's 4,000 pictures by this project's own stages, and asked all of
its test questions, beside what one can answer without looking."""

from __future__ import annotations

import json
import random
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jobs.demo import spoken
from jobs.parts import assemble, write_tiny_language_model
from jobs.recipes import Recipe
from pipelines import storage
from pipelines.curation.curate import curate
from pipelines.curation.export import add_file
from pipelines.evaluation.benchmarks.easy_vqa import drawings
from pipelines.evaluation.evaluate import evaluate
from pipelines.settings import OwlError
from pipelines.training.train import train

PARTS = ("pairs", "instructions", "text")


def run(source: str, folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Test accuracy with its interval, the two baselines, and the seconds of the whole way from the tars."""
    began = time.monotonic()
    write_raw(folder / "raw", source)
    for part in PARTS:
        curate([f"{folder}/raw/{part}"], f"{folder}/curated/{part}", recipe.curation)
    language, start = f"{folder}/parts/language", f"{folder}/parts/owl"
    write_tiny_language_model(spoken(f"{folder}/curated/text"), language)
    assemble(recipe.parts.model_copy(update={"language_model": language}), start)
    for stage, part in (("language", "text"), ("stage1", "pairs"), ("stage2", "instructions")):
        settings = getattr(recipe, stage).model_copy(update={"start": start, "data": [f"{folder}/curated/{part}"]})
        train(stage, settings, f"{folder}/runs/{stage}")
        start = f"{folder}/runs/{stage}/model"
    found = evaluate(start, "easy_vqa", source, f"{folder}/evaluation", recipe.evaluation)
    return {
        "accuracy": found["headline"],
        "by type": found["scores"]["picture"],
        **baselines(source),
        "questions": found["questions"],
        "seconds": round(time.monotonic() - began),
        "model": start,
        "report": f"{folder}/evaluation/report.html",
    }


def baselines(source: str) -> dict[str, float]:
    """Test accuracy of the commonest answer in training, and of the commonest to the same question."""
    told: dict[str, Counter] = {}
    for question, answer in asked_in(source, "train"):
        told.setdefault(question, Counter())[answer] += 1
    majority = sum(told.values(), Counter()).most_common(1)[0][0]
    held = asked_in(source, "test")
    guesses = [told[question].most_common(1)[0][0] if question in told else majority for question, _ in held]
    right = sum(guess == answer for guess, (_, answer) in zip(guesses, held, strict=True))
    return {
        "question alone": 100 * right / len(held),
        f"always {majority!r}": 100 * sum(answer == majority for _, answer in held) / len(held),
    }


def asked_in(source: str, split: str) -> list[tuple[str, str]]:
    return [(qa["question"], qa["answer"]) for _, _, asked in drawings(source, split) for qa in asked]


def write_raw(
    folder: Path, source: str, most: int | None = None, caption: Callable[[list[dict]], str] | None = None
) -> None:
    """Raw shards: a caption a picture (`caption_of`, or another), a question and its answer about a picture, and the
    same words without pictures for the language model; ``most`` of the questions, drawn at random."""
    caption = caption or caption_of
    if (folder / "written.json").exists():
        return
    try:
        found = drawings(source, "train")
    except FileNotFoundError as error:
        raise OwlError(f"no {error.filename} and no train-*.tar in {source}: name easy-VQA's folder") from None
    samples = [
        (picture if isinstance(picture, bytes) else storage.read_bytes(picture), qas) for _, picture, qas in found
    ]
    asked = [(picture, qa) for picture, qas in samples for qa in qas]
    random.Random(0).shuffle(asked)
    captions = [(picture, {"captions": [caption(qas)]}) for picture, qas in samples]
    told = [(picture, conversation(qa, picture=True)) for picture, qa in asked[:most]]
    named = [{"question": "what is it?", "answer": caption(qas)} for _, qas in samples]
    words = [(None, conversation(qa, picture=False)) for qa in [qa for _, qa in asked[:most]] + named]
    rows: list[Sequence[tuple[bytes | None, dict]]] = [captions, told, words]
    for part, some in zip(PARTS, rows, strict=True):
        write_tars(folder / part, some)
    (folder / "written.json").write_text("{}")


SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def caption_of(asked: list[dict]) -> str:
    """What the answers tell of a picture: its colour and its shape, as far as they do ("blue rectangle")."""
    known = [qa["answer"] for qa in asked if qa["answer"] not in ("yes", "no")]
    for qa in asked:
        words = qa["question"].rstrip("?").split()
        denied = "no" in words or "not" in words
        if qa["answer"] in ("yes", "no") and (qa["answer"] == "yes") != denied:
            known += words
    colour, shape = (next((word for word in words if word in known), "") for words in (COLOURS, SHAPES))
    return f"{colour} {shape or 'shape'}".strip()


def named_in(asked: list[dict]) -> str:
    """What its answers name, and nothing that follows from a yes or a no: often the colour or the shape alone."""
    return " ".join(sorted({qa["answer"] for qa in asked} - {"yes", "no"})) or "shape"


def conversation(qa: dict, picture: bool) -> dict:
    show = "<image> " if picture else ""
    turns = [{"from": "human", "value": show + qa["question"]}, {"from": "gpt", "value": qa["answer"]}]
    return {"conversations": turns}


def write_tars(folder: Path, rows: Sequence[tuple[bytes | None, dict]], shards: int = 4) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{folder.name}-{shard:05d}.tar", "w") as tar:
            for number in range(shard, len(rows), shards):
                picture, told = rows[number]
                if picture is not None:
                    add_file(tar, f"{number:06d}.png", picture)
                add_file(tar, f"{number:06d}.json", json.dumps(told).encode())
