"""`owl doctor`: what a job will need, told before it starts."""

from __future__ import annotations

from pathlib import Path

import torch

from owl_model import OwlConfig, OwlForConditionalGeneration
from owl_model.config import PRESETS
from owl_model.memory import ATTENTION, predict_inference, predict_training
from pipelines.settings import OwlError
from pipelines.training.stages import STAGES, Lora, prepare, train_mode

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def config_of(model: str) -> OwlConfig:
    """A preset by name, or a model folder's configuration."""
    if model in PRESETS:
        return PRESETS[model]()
    if (Path(model) / "config.json").exists():
        return OwlConfig.from_pretrained(model)
    raise OwlError(f"{model!r} is neither a preset ({', '.join(PRESETS)}) nor a model folder")


def memory(
    model: str,
    stage: str,
    *,
    batch: int,
    length: int,
    pictures: int,
    dtype: str,
    checkpointing: bool,
    lora: Lora,
) -> dict[str, int]:
    """Bytes by part of one step of ``stage`` (a training stage, or "inference") on one device."""
    if stage not in (*STAGES, "inference"):
        raise OwlError(f"unknown stage {stage!r}; known: {', '.join(STAGES)}, inference")
    if dtype not in DTYPES:
        raise OwlError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    config = config_of(model)
    if length < pictures * config.visual_tokens:
        raise OwlError(f"{pictures} pictures take {pictures * config.visual_tokens} tokens; the length is {length}")
    with torch.device("meta"):
        attention = {"attn_implementation": ATTENTION}
        owl = OwlForConditionalGeneration._from_config(config, dtype=DTYPES[dtype], **attention)
        if stage == "inference":
            return predict_inference(owl, batch=batch, length=length)
        trained = prepare(owl, STAGES[stage], lora)
        train_mode(owl, STAGES[stage])
        if checkpointing:
            owl.activation_checkpointing_enable()
        return predict_training(owl, trained, batch=batch, length=length, pictures=pictures)
