"""`owl doctor`: what a job will need, told before it starts."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, LlamaConfig

from jobs.parts import assemble
from jobs.recipes import Recipe
from owl_model import OwlAbstractorConfig, OwlConfig, OwlForConditionalGeneration, OwlProcessor, OwlVisionConfig
from owl_model.config import PRESETS
from owl_model.memory import ATTENTION, predict_inference, predict_training
from owl_model.official import OWL2_ADAPTIVE
from pipelines.settings import OwlError
from pipelines.training.dataset import Dataset
from pipelines.training.feed import Feed, Looks
from pipelines.training.loop import patches_of
from pipelines.training.stages import STAGES, Lora, Stage, count_parameters, prepare, train_mode
from pipelines.training.train import model_folder
from pipelines.training.watch import matrix_rate, operations

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


# --- a recipe as a whole ---------------------------------------------------------------------------------------------

SHARE_OF_PEAK = 0.4
"""What training is taken to reach of the matrices' rate, for the prediction of time."""
RESERVE = 1.1
"""What allocators take beside what is asked of them."""


def examine(
    recipe: Recipe, stage: str, data: list[str], start: str, run: str, gigabytes: float, teraflops: float
) -> dict[str, Any]:
    """Memory of a worker by part, days, and checks: {"name", "good", "found", "change"}. ``gigabytes`` and
    ``teraflops`` of a worker are looked up on this machine where they are 0."""
    stage = stage or recipe.train
    if stage not in STAGES:
        raise OwlError(f"unknown stage {stage!r}; known: {', '.join(STAGES)}")
    settings: Stage = getattr(recipe, stage.removeprefix("owl2_"))
    config = planned(recipe, settings, start)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    needs, counts = training_memory(config, stage, settings)
    batch = Checked("first batch", lambda: first_batch(recipe, settings, stage, data, start))
    sample = batch.value or {"tokens": settings.max_tokens, "pictures": 1.0}
    with torch.device("meta"):
        patches = patches_of(OwlForConditionalGeneration._from_config(config))
    asked = operations(counts, sample["tokens"], 1, patches) * settings.batch_size * settings.steps
    device = torch.device("cuda" if torch.cuda.is_available() and settings.gpus_per_worker else "cpu")
    rate = teraflops * 1e12 or matrix_rate(device, dtype)
    days = asked / (rate * SHARE_OF_PEAK * settings.workers) / 86400
    room = gigabytes * 1e9 or memory_here(device, settings)
    checkpoint = 12 * sum(count["trainable"] for count in counts.values())
    model = 4 * sum(count["total"] for count in counts.values())
    checks = [
        check("memory", needs["total"] < room, f"{size(needs['total'])} of {size(room)} a worker", less(settings)),
        *(Checked(f"data {folder}", partial(rows_in, folder)).row("owl curate RAW --out FOLDER") for folder in data),
        Checked("start", lambda: found_start(recipe, start)).row(
            "--set parts.language_model=FOLDER, --set parts.vision=FOLDER, or --start"
        ),
        disk_check(run, model + (settings.keep_checkpoints + 1) * checkpoint),
    ]
    if data:
        told = {name: round(value, 2) for name, value in sample.items()}
        checks.append(check("first batch", not batch.error, batch.error or f"{told} a sample", "see above"))
    return {
        "stage": stage,
        "memory": needs,
        "days": round(days, 5),
        "assumed": f"{rate / 1e12:.3g} · 10¹² operations a second, {SHARE_OF_PEAK:.0%} of them used, "
        f"{sample['tokens']:.0f} tokens a sample",
        "checkpoint": checkpoint,
        "checks": checks,
    }


def check(name: str, good: bool, found: str, change: str) -> dict[str, Any]:
    return {"name": name, "good": good, "found": found, "change": "" if good else change}


class Checked:
    """Something that is tried once: its value, or the one sentence that says why not."""

    def __init__(self, name: str, attempt: Callable[[], Any]):
        self.name, self.value, self.error = name, None, ""
        try:
            self.value = attempt()
        except (OwlError, OSError, ValueError) as error:
            self.error = str(error)

    def row(self, change: str) -> dict[str, Any]:
        return check(self.name, not self.error, self.error or str(self.value), change)


def size(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.0f} MB"


def duration(days: float) -> str:
    unit, many = next((u, n) for u, n in (("days", 1), ("hours", 24), ("minutes", 1440)) if days * n >= 2 or n == 1440)
    return f"{days * many:,.1f} {unit}"


def less(settings: Stage) -> str:
    """Which settings take memory away, those that cost least first."""
    ways: Iterator[tuple[bool, str]] = iter(
        [
            (settings.precision == "fp32" and settings.gpus_per_worker > 0, "precision=bf16"),
            (not settings.micro_batch, f"micro_batch={max(1, settings.batch_size // settings.workers // 2)}"),
            (settings.micro_batch > 1, f"micro_batch={settings.micro_batch // 2}"),
            (not settings.checkpoint_activations, "checkpoint_activations=true"),
            (settings.sharding == "none", "sharding=weights with workers=2 or more"),
            (settings.sharding == "weights", f"workers={2 * settings.workers}"),
        ]
    )
    return "--set " + ", or --set ".join(way for open_, way in ways if open_)


def planned(recipe: Recipe, settings: Stage, start: str) -> OwlConfig:
    """The configuration that a run would have."""
    if start:
        config = OwlConfig.from_pretrained(model_folder(start))
    else:
        parts = recipe.parts
        vision = OwlVisionConfig(**parts.vision) if isinstance(parts.vision, dict) else None
        width = vision.hidden_size if vision else AutoConfig.from_pretrained(parts.vision).hidden_size
        config = OwlConfig(
            vision_config=vision or AutoConfig.from_pretrained(parts.vision),
            abstractor_config=OwlAbstractorConfig(**{"encoder_hidden_size": width, **parts.abstractor}),
            text_config=AutoConfig.from_pretrained(parts.language_model)
            if parts.language_model
            else LlamaConfig(**recipe.text),
            adaptive_modules=list(OWL2_ADAPTIVE) if parts.adaptive else [],
        )
    if settings.image_size and isinstance(config.vision_config, OwlVisionConfig):
        config.vision_config.image_size = settings.image_size
        if config.abstractor_config.grid_size:
            config.abstractor_config.grid_size = settings.image_size // config.vision_config.patch_size
    return config


def training_memory(config: OwlConfig, stage: str, settings: Stage) -> tuple[dict[str, int], dict]:
    """Bytes of a worker by part, and parameters by module. What trains is held in fp32, with two numbers of AdamW's;
    under bf16 all else takes half, and autocast keeps a copy of what trains."""
    half = settings.precision == "bf16"
    trains = settings.trains(stage)
    rows = settings.micro_batch or -(-settings.batch_size // settings.workers)
    length = settings.pack_tokens or settings.max_tokens
    with torch.device("meta"):
        attention = {"attn_implementation": ATTENTION}
        dtype = torch.bfloat16 if half else torch.float32
        owl = OwlForConditionalGeneration._from_config(config, dtype=dtype, **attention)
        model = prepare(owl, trains, settings.lora)
        train_mode(owl, trains)
        if settings.checkpoint_activations:
            owl.activation_checkpointing_enable()
        pictures = 1 if trains.pictures else 0
        parts = predict_training(owl, model, batch=rows, length=length, pictures=pictures)
    counts = count_parameters(owl)
    learning = sum(count["trainable"] for count in counts.values())
    resting = sum(count["total"] for count in counts.values()) - learning
    shared = settings.workers if settings.sharding == "weights" else 1
    needs = {
        "weights": (resting * (2 if half else 4) + learning * 4) // shared + learning * 2 * half,
        "gradients": 4 * learning // shared,
        "optimizer": 8 * learning // shared,
        "activations": parts["activations"],
        "workspace": parts["workspace"],
    }
    return {**needs, "total": int(RESERVE * sum(needs.values()))}, counts


def memory_here(device: torch.device, settings: Stage) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available / settings.workers


def rows_in(folder: str) -> str:
    return f"{sum(Dataset([folder]).rows):,} samples"


def found_start(recipe: Recipe, start: str) -> str:
    """Where training begins: a model, or the parts of one."""
    if start:
        return model_folder(start)
    language, vision = recipe.parts.language_model, recipe.parts.vision
    if not language:
        raise OwlError("parts.language_model names no folder")
    for name, folder in (("parts.language_model", language), ("parts.vision", vision)):
        if isinstance(folder, str) and not os.path.exists(f"{folder}/config.json"):
            raise OwlError(f"{name} {folder!r} has no config.json")
    return f"{vision if isinstance(vision, str) else 'a fresh vision encoder'}, {language}"


def first_batch(recipe: Recipe, settings: Stage, stage: str, data: list[str], start: str) -> dict[str, float]:
    """The first batch as a single worker would see it: tokens and pictures a sample."""
    if not data:
        return {}
    with tempfile.TemporaryDirectory(prefix="owl-doctor-") as here:
        folder = start and model_folder(start)
        if not folder:
            found_start(recipe, start)
            assemble(recipe.parts, here)
            folder = here
        processor = OwlProcessor.from_pretrained(folder)
    looks = Looks(pictures=settings.trains(stage).pictures)
    few = min(settings.batch_size, 32)
    dataset = Dataset(data)
    order = dataset.order(settings.seed, settings.weights)
    (batch,) = Feed(dataset, processor, order, few, max_tokens=settings.max_tokens, looks=looks).batch(0)
    if not batch.supervised:
        raise OwlError("nothing in it is supervised: every answer is empty or cut; look at max_tokens")
    return {"tokens": batch.tokens / few, "pictures": batch.pictures / few, "cut": batch.cut / few}


def disk_check(run: str, needed: int) -> dict[str, Any]:
    if "://" in run:
        return check("disk", True, f"{size(needed)} go to {run}", "")
    folder = Path(run).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return check("disk", needed < free, f"{size(needed)} of {size(free)} free at {folder}", "--run elsewhere")


def show(found: dict[str, Any]) -> None:
    console = Console()
    table = Table("memory of a worker", "", box=None)
    for name, number in found["memory"].items():
        table.add_row(name, size(number))
    console.print(table)
    console.print(f"\nTime: {duration(found['days'])} ({found['assumed']})\n", highlight=False)
    for row in found["checks"]:
        mark = "[green]good[/green]" if row["good"] else "[red]not so[/red]"
        console.print(f"  {mark}  {row['name']}: {row['found']}", highlight=False)
        if row["change"]:
            console.print(f"          → {row['change']}", highlight=False, style="dim")
