"""Named recipes: everything that one run of the whole way needs, typed. `owl … --recipe NAME --set key=value`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from jobs import papers
from jobs.world.shards import World
from pipelines.curation.filters import Limits
from pipelines.curation.likeness import Deduplication
from pipelines.curation.options import Curation
from pipelines.evaluation.evaluate import Evaluation
from pipelines.fetching.fetch import Fetching
from pipelines.serving.options import Serving
from pipelines.settings import SettingError, Settings, refuse_unknown
from pipelines.training.stages import Lora, Optimization, Stage


class Parts(Settings):
    """The foundation parts that a new Owl is put together from."""

    vision: str | dict[str, Any] = {}
    """A vision backbone's folder, or the settings of a fresh Owl ViT."""
    image_size: int = 0
    """Side of the pictures in px, where it is not the backbone's own; for those that take any, as convolutions do."""
    language_model: str = ""
    """A causal language model's folder, with its tokenizer."""
    abstractor: dict[str, Any] = {}
    """Settings of the fresh visual abstractor."""
    adaptive: bool = False
    """Whether the language model gets mPLUG-Owl2's modality-adaptive module."""
    template: str | dict[str, Any] = "owl1"
    """How conversations are written: owl1, owl2, owl2_finetune, chatml, plain, or one's own fields."""


class Recipe(Settings):
    """One group of settings for each part of the way."""

    about: str
    """Command, hardware, time and expected score."""
    train: str = ""
    """The stage that `owl train` runs where none is named."""
    mix: dict[str, float] = {}
    """What the paper mixes, in thousands of samples (0: it does not tell). Name your own with --data, in an order, and
    their shares with --set weights=[…]."""
    text: dict[str, Any] = {}
    """LLaMA's shape that `owl doctor` assumes where no language model is named."""
    parts: Parts = Parts()
    """What the model is made of."""
    fetching: Fetching = Fetching()
    """How the pictures of URL lists are fetched."""
    curation: Curation = Curation()
    """What is kept of the raw samples."""
    language: Stage = Stage()
    """Pretraining of a stand-in language model, where the user brings none."""
    stage1: Stage = Stage()
    """Vision and abstractor learn to speak to the frozen language model."""
    stage2: Stage = Stage()
    """Abstractor and LoRA learn to follow instructions."""
    evaluation: Evaluation = Evaluation()
    """How benchmarks are run."""
    serving: Serving = Serving()
    """How the model is served."""
    world: World = World()
    """The picture world that the demo writes."""


def demo() -> Recipe:
    """The embedded default: a world, a language model and an Owl of a million parameters, in minutes, on two cores."""
    quick = Optimization(
        optimizer="muon",
        learning_rate=3e-3,
        muon_rate=0.02,
        muon_momentum=0.8,
        weight_decay=0.01,
        betas=(0.9, 0.98),
        warmup=20,
    )
    worker = Stage(workers=2, batch_size=32, optimization=quick, checkpoint_every=150)
    return Recipe(
        about="owl demo · 2 CPU cores, 8 GB · 5 minutes · 95 % of held-out questions",
        parts=Parts(
            vision={
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "image_size": 72,
                "patch_size": 24,
            },
            abstractor={
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_queries": 10,
            },
            template="plain",
        ),
        curation=Curation(limits=Limits(min_side=64), deduplication=Deduplication(radius=6, detail=12)),
        evaluation=Evaluation(controls=True),
        serving=Serving(port=0),
        language=worker.model_copy(update={"steps": 550}),
        stage1=worker.model_copy(update={"steps": 1500}),
        stage2=worker.model_copy(
            update={
                "steps": 550,
                "optimization": quick.model_copy(update={"muon_rate": 0.01, "learning_rate": 2e-3}),
                "lora": Lora(
                    rank=16,
                    alpha=32,
                    dropout=0.0,
                    targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
                ),
            }
        ),
    )


def demo_small() -> Recipe:
    """The demo at a reduced size, for a check that every part runs; its scores mean nothing."""
    full = demo()
    few = {"steps": 30, "checkpoint_every": 10}
    return full.model_copy(
        update={
            "about": "owl demo --recipe demo_small · 2 CPU cores · 2 minutes · no score to expect",
            "world": World(pairs=240, instructions=120, texts=400, questions=20, shards=4),
            "language": full.language.model_copy(update=few),
            "stage1": full.stage1.model_copy(update=few),
            "stage2": full.stage2.model_copy(update=few),
        }
    )


def easy_vqa() -> Recipe:
    """easy-VQA's 4,000 drawings, with a vision tower that was pretrained on photographs, as mPLUG-Owl's was: a fresh
    one learns their colours and not their shapes from so few (docs/log.md)."""
    full = demo()
    learn = Optimization(learning_rate=2e-3, weight_decay=0.05, warmup=30)
    return full.model_copy(
        update={
            "about": "owl bench easy-vqa --data … --dir … · 2 CPU cores, 5 GB · 12 minutes · 91 % of test questions",
            "parts": full.parts.model_copy(
                update={"vision": f"{shared_weights()}/mobilenet-v2-imagenet", "image_size": 128}
            ),
            "curation": Curation(limits=Limits(min_side=32, min_words=1), deduplication=None),
            "language": full.language.model_copy(update={"steps": 300}),
            "stage1": full.stage1.model_copy(update={"steps": 600, "freeze_vision": True, "optimization": learn}),
            "stage2": full.stage2.model_copy(update={"steps": 1500}),
            "evaluation": Evaluation(batch_size=128, actors=2),
        }
    )


def shared_weights() -> str:
    """Small pretrained parts for trials: OWL_SHARED's."""
    return f"{os.environ.get('OWL_SHARED', '../shared')}/data/weights"


def real_small() -> Recipe:
    """Real photographs and real pretrained towers, small enough for a laptop: MobileNetV2 (49 visual features), a
    LLaMA of 260,000 parameters, and the 900 photographs of a Flickr8k cut."""
    weights = shared_weights()
    optimization = Optimization(learning_rate=1e-3, weight_decay=0.05, warmup=40)
    stage = Stage(
        workers=2, batch_size=32, optimization=optimization, freeze_vision=True, checkpoint_every=100, steps=400
    )
    return Recipe(
        about="owl train stage1 --recipe real_small · 2 CPU cores, 4 GB · 4 minutes · the picture lowers the loss",
        parts=Parts(
            vision=f"{weights}/mobilenet-v2-imagenet",
            language_model=f"{weights}/tinystories-llama/stories260K",
            abstractor={
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_queries": 8,
            },
            template="plain",
        ),
        curation=Curation(limits=Limits(min_side=128)),
        stage1=stage,
        stage2=stage.model_copy(update={"steps": 60, "lora": Lora(rank=8)}),
    )


def of_paper(name: str, size: str) -> Recipe:
    """A stage of a paper's, at one of the sizes."""
    paper, sized = papers.PAPERS[name], papers.SIZES[size]
    group = paper.train.removeprefix("owl2_")
    grid = sized.vision["image_size"] // sized.vision.get("patch_size", 14) if paper.adaptive else 0
    settings = Stage.model_validate(
        {**paper.settings.model_dump(), **sized.place, **sized.shrink(name, paper.settings)}
    )
    recipe = Recipe(
        about=f"owl train --recipe {name}{size} --data … --run … · {sized.hardware[name]} · {sized.score}",
        train=paper.train,
        mix=paper.mix,
        text=sized.text,
        parts=Parts(
            vision=sized.vision,
            abstractor={**sized.abstractor, "grid_size": grid},
            adaptive=paper.adaptive,
            template="owl2_finetune" if paper.adaptive else "owl1",
        ),
    )
    return recipe.model_copy(update={group: settings})


RECIPES: dict[str, Callable[[], Recipe]] = {
    "demo": demo,
    "demo_small": demo_small,
    "easy_vqa": easy_vqa,
    "real_small": real_small,
    **{f"{name}{size}": partial(of_paper, name, size) for name in papers.PAPERS for size in papers.SIZES},
}


def load(name: str) -> Recipe:
    """Raises SettingError for a name that is none, with the nearest one."""
    if name not in RECIPES:
        try:
            refuse_unknown(name, name, RECIPES)
        except SettingError as error:
            raise SettingError(str(error).replace("unknown setting", "unknown recipe")) from None
    return RECIPES[name]()
