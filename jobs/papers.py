"""The papers' stages as recipes: mPLUG-Owl (arXiv 2304.14178, section 4.1) and mPLUG-Owl2 (arXiv 2311.04257, section
4.1), at their own size, at a billion parameters for one GPU, and tiny for two CPU cores.

Where paper and released code differ, the paper is followed; the code's stage 2 of mPLUG-Owl leaves the abstractor
frozen and decays its rate linearly. The data are the user's, and so are vision encoder and language model: stage 1
begins from their folders (`--set parts.vision=… --set parts.language_model=…`), stage 2 from the run of stage 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pipelines.training.stages import Lora, Optimization, Stage

ADAM: dict[str, Any] = {"betas": (0.9, 0.98), "epsilon": 1e-6, "clip": 1.0}
OWL_STAGE1 = Stage(  # 2.1 million tokens a batch, at 256 a pair
    steps=50_000,
    batch_size=8192,
    max_tokens=256,
    optimization=Optimization(learning_rate=1e-4, weight_decay=0.1, warmup=2000, **ADAM),
)
OWL_STAGE2 = Stage(
    steps=2000,
    batch_size=256,
    optimization=Optimization(learning_rate=2e-5, weight_decay=1e-4, warmup=50, **ADAM),
    lora=Lora(rank=8, alpha=32, dropout=0.05, targets=["q_proj", "v_proj"]),
)
OWL2_STAGE1 = Stage(
    steps=42_500,
    batch_size=8192,
    max_tokens=256,
    optimization=Optimization(learning_rate=1e-4, weight_decay=0.05, warmup=1000, layer_decay=0.9, **ADAM),
)
OWL2_STAGE2 = Stage(  # one epoch of 1.23 million samples
    steps=4800,
    batch_size=256,
    image_size=448,
    optimization=Optimization(learning_rate=2e-5, weight_decay=0.0, warmup=144, **ADAM),
)


class Paper(NamedTuple):
    train: str
    settings: Stage
    adaptive: bool
    mix: dict[str, float]
    """Samples of each dataset in thousands, where the paper tells."""


PAPERS = {
    "owl_stage1": Paper(
        "stage1", OWL_STAGE1, False, dict.fromkeys(("LAION-400M", "COYO-700M", "Conceptual Captions", "MSCOCO"), 0)
    ),
    "owl_stage2": Paper(
        "stage2", OWL_STAGE2, False, {"Alpaca (text)": 102, "Vicuna (text)": 90, "Baize (text)": 50, "LLaVA": 150}
    ),
    "owl2_stage1": Paper(
        "owl2_stage1", OWL2_STAGE1, True, dict.fromkeys(("CC3M", "CC12M", "COCO", "COYO", "LAION-en", "DataComp"), 0)
    ),
    "owl2_stage2": Paper(
        "owl2_stage2",
        OWL2_STAGE2,
        True,
        {"captions, VQA, referring (TextCaps … VisualGenome)": 0, "LLaVA": 150, "ShareGPT (text)": 80, "SlimOrca": 0},
    ),
}


class Size(NamedTuple):
    """How a paper's stage becomes one of this size."""

    hardware: dict[str, str]
    """By stage: hardware, memory and time."""
    score: str
    vision: dict[str, Any]
    abstractor: dict[str, Any]
    text: dict[str, Any]
    """The shape of LLaMA that the predictions assume; the real one is the user's."""
    place: dict[str, Any]
    """What the stage's settings become: where it runs, and in which pieces."""
    shrink: Callable[[str, Stage], dict[str, Any]]
    """And how much less of it there is."""


ON_GPUS = {"gpus_per_worker": 1, "cpus_per_worker": 8, "precision": "bf16", "checkpoint_activations": True}


def as_published(name: str, stage: Stage) -> dict[str, Any]:
    return {}


def a_billion(name: str, stage: Stage) -> dict[str, Any]:
    """A twentieth of the samples: a batch as many times smaller, and steps enough for what is left."""
    return {"batch_size": stage.batch_size // 8, "steps": stage.steps * 2 // 5, "image_size": stage.image_size and 336}


def a_million(name: str, stage: Stage) -> dict[str, Any]:
    """Minutes on two cores; rates as such small models want them."""
    quick = {"learning_rate": 1e-3, "warmup": 20, "weight_decay": 0.01}
    return {
        "batch_size": 32,
        "steps": 400,
        "image_size": stage.image_size and 112,
        "optimization": stage.optimization.model_copy(update=quick),
    }


SIZES = {
    "": Size(
        {
            "owl_stage1": "8 H100, 7 GB each · 11 days",
            "owl_stage2": "8 H100, 24 GB each · 2.5 hours",
            "owl2_stage1": "8 H100, 12 GB each · 11 days",
            "owl2_stage2": "8 H100, 60 GB each · 11 hours",
        },
        "as owl doctor predicts; not run here",
        {"image_size": 224},
        {},
        {},
        {**ON_GPUS, "workers": 8, "micro_batch": 32, "sharding": "weights", "checkpoint_every": 500},
        as_published,
    ),
    "_1b": Size(
        {
            "owl_stage1": "1 H100, 7 GB · 18 hours",
            "owl_stage2": "1 H100, 11 GB · 10 minutes",
            "owl2_stage1": "1 H100, 7 GB · 16 hours",
            "owl2_stage2": "1 H100, 33 GB · 35 minutes",
        },
        "as owl doctor predicts; not run here",
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "patch_size": 16,
            "image_size": 224,
        },
        {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_hidden_layers": 6},
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
        },
        {**ON_GPUS, "micro_batch": 32, "checkpoint_every": 500},
        a_billion,
    ),
    "_tiny": Size(
        dict.fromkeys(PAPERS, "2 CPU cores, 3.5 GB · 5 minutes"),
        "to try the way with; owl demo is the one that answers",
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_size": 14,
            "image_size": 56,
        },
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_queries": 10,
        },
        {
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 100,
        },
        {"workers": 2, "checkpoint_every": 100},
        a_million,
    ),
}
