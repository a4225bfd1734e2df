"""Does each part of the recipes earn its keep? The papers' ablations in small, on the demo's picture world and on
easy-VQA (github.com/vzhou842/easy-VQA): stage 1 before stage 2 or not, the abstractor trained in stage 2 or not,
mPLUG-Owl2's adaptive module or not. Held-out questions, exact match, several seeds."""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer, LlamaForCausalLM

from jobs.demo import curate_part, draw_world, spoken
from jobs.parts import assemble, write_tiny_language_model
from jobs.recipes import Recipe, load
from owl_model import OwlForConditionalGeneration
from pipelines import storage
from pipelines.curation.curate import Curation, curate
from pipelines.curation.export import add_file
from pipelines.curation.filters import Limits
from pipelines.evaluation.evaluate import Evaluation, evaluate
from pipelines.settings import OwlError
from pipelines.training.stages import Stage
from pipelines.training.train import train


class Study(NamedTuple):
    """Where everything of one dataset is: curated pairs, instructions and text, and held-out questions."""

    root: Path
    heldout: str
    recipe: Recipe


class Variant(NamedTuple):
    stages: tuple[str, ...]
    changes: dict[str, Any]
    """Of stage 2."""
    adaptive: bool = False


OWL = {
    "both stages": Variant(("stage1", "stage2"), {}),
    "stage 2 alone": Variant(("stage2",), {}),
    "abstractor frozen in stage 2": Variant(("stage1", "stage2"), {"freeze_abstractor": True}),
}
OWL2 = {
    "Owl2, adaptive module": Variant(("owl2_stage1", "owl2_stage2"), {}, adaptive=True),
    "Owl2 without it": Variant(("stage1", "owl2_stage2"), {}),
}
VARIANTS = OWL | OWL2


def picture_world(folder: Path) -> Study:
    recipe = load("demo")
    draw_world(folder / "world", recipe.world)
    for part in ("pairs", "instructions", "text"):
        curate_part(folder, part, recipe)
    return Study(folder, f"{folder}/world/heldout", recipe)


QUESTIONS = 12_000
ASKED = 800


def easy_vqa(folder: Path, source: Path) -> Study:
    """easy-VQA's tars as raw shards: a caption a picture ("blue rectangle"), a question and its answer, and the same
    words without pictures for the language model; questions about its test pictures are held out."""
    if not (source / "train-00000.tar").exists():
        raise OwlError(f"no train-00000.tar in {source}: name the folder of easy-VQA's tars with --easy-vqa")
    if not (folder / "world/written.json").exists():
        samples = [row for path in sorted(source.glob("train-*.tar")) for row in members(path)]
        chance = random.Random(0)
        asked = [(picture, qa) for picture, asked in samples for qa in asked]
        chance.shuffle(asked)
        captions = [(picture, {"captions": [caption_of(qas)]}) for picture, qas in samples]
        told = [(picture, conversation(qa, picture=True)) for picture, qa in asked[:QUESTIONS]]
        words = [(None, conversation(qa, picture=False)) for _, qa in asked[:QUESTIONS]]
        for part, rows in (("pairs", captions), ("instructions", told), ("text", words)):
            write_tars(folder / "world/raw" / part, rows)
        held = [(picture, qa) for picture, qas in members(source / "test-00000.tar") for qa in qas]
        write_questions(folder / "world/heldout", chance.sample(held, ASKED))
        (folder / "world/written.json").write_text("{}")
    recipe = load("demo")
    for part in ("pairs", "instructions", "text"):
        settings = Curation(limits=Limits(min_side=32, min_words=1), deduplication=None)
        curate([f"{folder}/world/raw/{part}"], f"{folder}/curated/{part}", settings)
    return Study(folder, f"{folder}/world/heldout", recipe)


def members(path: Path) -> list[tuple[bytes, list[dict]]]:
    """Each picture's bytes, and its questions and answers."""
    pictures, questions = {}, {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            data = tar.extractfile(member).read()  # type: ignore[union-attr]
            if extension == "png":
                pictures[key] = data
            elif extension == "json":
                questions[key] = json.loads(data)["qa"]
    return [(pictures[key], questions[key]) for key in sorted(pictures)]


def caption_of(asked: list[dict]) -> str:
    """What two of the questions tell of a picture, its colour and its shape, as far as they were asked."""
    answers = [qa["answer"] for qa in asked if qa["answer"] not in ("yes", "no")]
    return " ".join(dict.fromkeys(sorted(answers))) or "shape"


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


def write_questions(folder: Path, held: list[tuple[bytes, dict]]) -> None:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (picture, qa) in enumerate(held):
        name = f"pictures/{number:04d}.png"
        (folder / name).write_bytes(picture)
        content = [{"type": "image"}, {"type": "text", "text": qa["question"]}]
        kind = "yes_no" if qa["answer"] in ("yes", "no") else "what"
        row = {"id": str(number), "type": kind, "messages": [{"role": "user", "content": content}]}
        lines.append(json.dumps({**row, "pictures": [name], "answer": qa["answer"]}))
    (folder / "questions.jsonl").write_text("\n".join(lines))


def measure(study: Study, name: str, seeds: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """Accuracy on held-out questions of each variant and seed. Stages that variants share are trained once."""
    language = pretrained(study)
    for seed in range(seeds):
        for variant in names:
            chosen = VARIANTS[variant]
            shape = "adaptive" if chosen.adaptive else "plain"
            start = f"{study.root}/runs/{seed}/{shape}"
            parts = study.recipe.parts.model_copy(update={"language_model": language, "adaptive": chosen.adaptive})
            assemble(parts, start, seed)
            run = start
            for stage in chosen.stages:
                last = stage == chosen.stages[-1]
                run = f"{run}-{stage}" + (f"-{'-'.join(chosen.changes)}" if last and chosen.changes else "")
                settings = settings_of(study, stage, seed, start).model_copy(update=chosen.changes if last else {})
                train(stage, settings, run)
                start = f"{run}/model"
            out = f"{run}-answers"
            results = evaluate(start, "picture_world", study.heldout, out, Evaluation(controls=False))
            accuracy = results["scores"]["picture"]["all with pictures"]["accuracy"]
            yield {"data": name, "variant": variant, "seed": seed, "accuracy": round(accuracy, 4)}


def settings_of(study: Study, stage: str, seed: int, start: str) -> Stage:
    group = stage.removeprefix("owl2_")
    part = "pairs" if group == "stage1" else "instructions"
    settings: Stage = getattr(study.recipe, group)
    return settings.model_copy(update={"data": [f"{study.root}/curated/{part}"], "start": start, "seed": seed})


def pretrained(study: Study) -> str:
    """The language model that all variants begin from, as a folder of its own."""
    fresh, parts, run = (f"{study.root}/runs/{name}" for name in ("language", "language-owl", "language-run"))
    write_tiny_language_model(spoken(f"{study.root}/curated/text"), fresh)
    assemble(study.recipe.parts.model_copy(update={"language_model": fresh}), parts)
    update = {"data": [f"{study.root}/curated/text"], "start": parts}
    train("language", study.recipe.language.model_copy(update=update), run)
    target = f"{study.root}/runs/language-model"
    if not storage.exists(f"{target}/config.json"):
        write_language_model(f"{run}/model", target)
    return target


def write_language_model(folder: str, target: str) -> None:
    """The language model of an Owl, by itself."""
    owl = OwlForConditionalGeneration.from_pretrained(folder)
    text = LlamaForCausalLM(owl.config.text_config)
    text.model.load_state_dict(owl.model.language_model.state_dict())
    text.lm_head.load_state_dict(owl.lm_head.state_dict())
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    text.save_pretrained(target)
