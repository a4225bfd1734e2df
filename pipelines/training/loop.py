"""What each training worker does, from the first line to the last."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from owl_model import OwlForConditionalGeneration, OwlProcessor
from pipelines import storage
from pipelines.training import stages, state
from pipelines.training.feed import Dataset, Feed
from pipelines.training.step import build_optimizers, schedule, train_step

log = logging.getLogger(__name__)


def work(config: dict[str, Any]) -> None:
    """One worker of a stage. ``config``: ``stage``, ``settings`` (of Stage), ``start`` (model folder to begin from),
    ``finish`` (model folder to write), ``log`` (JSON of losses), ``counter`` (progress)."""
    settings = stages.Stage.model_validate(config["settings"])
    trains = settings.trains(config["stage"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.manual_seed(settings.seed)

    # 1. The model, with what trains unfrozen.
    owl = OwlForConditionalGeneration.from_pretrained(config["start"], dtype=torch.float32)
    processor = OwlProcessor.from_pretrained(config["start"])
    adapted = stages.prepare(owl, trains, settings.lora)
    stages.train_mode(owl, trains)
    counts = stages.count_parameters(owl)
    if settings.checkpoint_activations:
        owl.gradient_checkpointing_enable({"use_reentrant": False})
    sharded = settings.sharding == "weights" and world > 1
    if sharded:
        shard(adapted, [] if trains.vision == "trains" else list(owl.model.vision_model.parameters()))
    optimizers = build_optimizers(adapted, settings.optimization)

    # 2. Where an earlier run stopped.
    step, history = state.restore(adapted, optimizers)
    model = ray.train.torch.prepare_model(adapted) if world > 1 and not sharded else adapted

    # 3. The data from there on.
    dataset = Dataset(settings.data)
    order = dataset.order(settings.seed, settings.weights)
    frozen_vision = trains.pictures and trains.vision == "frozen"
    feed = Feed(
        dataset,
        processor,
        order,
        settings.batch_size,
        rank=rank,
        world=world,
        micro_batch=settings.micro_batch,
        pictures=trains.pictures,
        always_look=sharded and trains.pictures,
        encode_pictures=Frozen(owl) if frozen_vision else None,
        keep_bytes=settings.keep_megabytes << 20,
    )

    # 4. Step after step.
    unsupervised = history[-1]["unsupervised"] if history else 0.0
    began, waited = time.monotonic(), 0.0
    asked = time.monotonic()
    precision = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    for batches in feed.batches(step, settings.steps):
        waited += time.monotonic() - asked
        rate = schedule(step, settings.steps, settings.optimization.warmup)
        metrics = train_step(model, batches, optimizers, settings.optimization, rate, precision)
        unsupervised = metrics["unsupervised"] = unsupervised + metrics["unsupervised"]
        step += 1
        if step % settings.log_every == 0 or step == settings.steps:
            history.append({"step": step, **metrics, "wait": waited / (time.monotonic() - began)})
            if rank == 0:
                config["counter"].at.remote(step, f"loss {metrics['loss']:.3f}")
        if step % settings.checkpoint_every == 0 and step < settings.steps:
            state.save({"step": step, **metrics}, adapted, optimizers, step, history)
        asked = time.monotonic()

    # 5. The model folder.
    used = dataset.used(order, step * settings.batch_size)
    whole = adapted
    if sharded:
        weights = state.gather_whole(adapted)
        if rank == 0:
            fresh = OwlForConditionalGeneration.from_pretrained(config["start"], dtype=torch.float32)
            whole = stages.prepare(fresh, trains, settings.lora)
            state.set_weights(whole, weights)
    if rank == 0:
        export(whole, processor, config["finish"])
        storage.write_json(config["log"], {"parameters": counts, "history": history, "used": used})
    ray.train.report({"step": step})


def shard(model: nn.Module, whole: list[nn.Parameter]) -> None:
    """Every worker holds a part of each layer (FSDP2), and gathers it when it is needed; all but ``whole``, which the
    feed uses by itself."""
    inside: set[nn.Module] = set()
    for module in model.modules():  # outer lists of layers come before those within them
        if isinstance(module, nn.ModuleList) and module not in inside:
            inside |= set(module.modules())
            for layer in module:
                if not set(layer.parameters()) & set(whole):
                    fully_shard(layer)
    fully_shard(model, ignored_params=set(whole))


class Frozen:
    """Pixels [N, 3, H, W] → features [N, P, D] of a vision encoder that does not train."""

    def __init__(self, owl: OwlForConditionalGeneration):
        self.model = owl.model

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.get_vision_features(pixels)


def export(model: nn.Module, processor: OwlProcessor, folder: str) -> None:
    """Writes a folder that ``from_pretrained`` opens, with LoRA merged into the language model."""
    owl = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    owl.save_pretrained(folder)
    processor.save_pretrained(folder)
    Path(folder, "finished").touch()
