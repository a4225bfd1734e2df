"""Does each part of the recipes earn its keep? The papers' ablations in small, on the demo's picture world and on
easy-VQA (github.com/vzhou842/easy-VQA): stage 1 before stage 2 or not, the abstractor trained in stage 2 or not,
mPLUG-Owl2's adaptive module or not. Held-out questions, exact match, several seeds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer, LlamaForCausalLM

from jobs.demo import curate_part, draw_world, spoken
from jobs.easy_vqa import PARTS, named_in, write_raw
from jobs.parts import assemble, write_tiny_language_model
from jobs.recipes import Recipe, load
from owl_model import OwlForConditionalGeneration
from pipelines import storage
from pipelines.curation.curate import curate
from pipelines.evaluation.evaluate import Evaluation, evaluate
from pipelines.training.stages import Stage
from pipelines.training.train import train


class Study(NamedTuple):
    """Where everything of one dataset is: curated pairs, instructions and text, and held-out questions."""

    root: Path
    benchmark: str
    heldout: str
    asked: int
    """Of the held-out questions; 0 asks all."""
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
    for part in PARTS:
        curate_part(folder, part, recipe)
    return Study(folder, "picture_world", f"{folder}/world/heldout", 0, recipe)


QUESTIONS = 12_000
ASKED = 2_400


def easy_vqa(folder: Path, source: Path) -> Study:
    """QUESTIONS of easy-VQA's about its training pictures, and ASKED about its test pictures. Captions tell less than
    is asked, as those of the web do: where they tell all, the second stage has nothing to teach the abstractor."""
    write_raw(folder / "world/raw", str(source), QUESTIONS, named_in)
    recipe = load("demo").model_copy(update={"curation": load("easy_vqa").curation})
    for part in PARTS:
        curate([f"{folder}/world/raw/{part}"], f"{folder}/curated/{part}", recipe.curation)
    return Study(folder, "easy_vqa", str(source), ASKED, recipe)


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
            results = evaluate(start, study.benchmark, study.heldout, out, Evaluation(limit=study.asked))
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
