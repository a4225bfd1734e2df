"""What each training worker does, from the first line to the last."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from owl_model import OwlForConditionalGeneration, OwlProcessor, packed
from owl_model.chat import Encoded
from owl_model.conversion import resize_pictures
from pipelines import storage
from pipelines.settings import OwlError
from pipelines.training import stages
from pipelines.training.cache import Cache
from pipelines.training.dataset import Dataset
from pipelines.training.feed import Feed, Looks
from pipelines.training.state import Saver, gather_whole, set_weights
from pipelines.training.step import build_optimizers, schedule, summed, train_step
from pipelines.training.watch import PATCHES, Diary, matrix_rate, operations, trackers


def work(config: dict[str, Any]) -> None:
    """One worker of a stage. ``config``: ``stage``, ``settings`` (of Stage), ``run`` (its folder), ``start`` (model
    folder to begin from), ``counter`` (progress)."""
    settings, run = stages.Stage.model_validate(config["settings"]), config["run"]
    trains = settings.trains(config["stage"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.manual_seed(settings.seed)

    # 1. The model, with what trains unfrozen.
    owl, processor = open_model(config["start"], settings.image_size)
    if settings.pack_tokens:
        refuse_packing(owl, processor)
    device, precision = ray.train.torch.get_device(), precision_of(settings)
    adapted, sharded = equipped(owl, trains, settings, device, world)
    optimizers = build_optimizers(adapted, settings.optimization)
    counts, patches = stages.count_parameters(owl), patches_of(owl)

    # 2. Where an earlier run stopped.
    saver = Saver(run, adapted, optimizers, at_once=not settings.checkpoint_beside)
    step, history = saver.restore()
    model = ray.train.torch.prepare_model(adapted) if world > 1 and not sharded else adapted

    # 3. The data from there on.
    dataset = Dataset(settings.data, Cache(int(settings.cache_gigabytes * 2**30)))
    feed = feed_of(dataset, owl, processor, settings, trains, rank, world, sharded)

    # 4. Step after step.
    diary = Diary(history, settings.data, trackers(run, settings.trackers) if rank == 0 else [])
    peak = matrix_rate(device, precision) * world
    keys: dict[int, list[str]] = {}
    looked, warned = time.monotonic(), False  # when a reclaim of machines was last asked for, and whether one was told
    asked = time.monotonic()
    for batches in feed.batches(step, settings.steps):
        diary.clock.spend("wait", asked)
        rate = schedule(step, settings.steps, settings.optimization.warmup)
        # A checkpoint holds the entries, and so the counts, of all steps before it.
        entries = (settings.log_every, settings.checkpoint_every, settings.steps)
        logged = any((step + 1) % every == 0 for every in entries)
        modules = stages.parts_of(owl) if logged else None
        batches = [feed.encoded(batch) for batch in batches]
        metrics = train_step(
            model, batches, optimizers, settings.optimization, rate, precision, len(settings.data), modules
        )
        step += 1
        diary.count(metrics)
        if settings.log_keys:
            keys[step] = [key for batch in batches for key in batch.keys]
        if logged:
            done = operations(counts, diary.sums["tokens"] + diary.sums["padding"], diary.sums["pictures"], patches)
            diary.write(step, metrics, rate, done / peak)
            if rank == 0:
                config["counter"].at.remote(step, f"loss {metrics['loss']:.3f}")
        leaving = False
        if agreed(time.monotonic() - looked > SECONDS_BETWEEN_LOOKS, device):
            looked = time.monotonic()
            leaving = ray.train.get_preemption_info() is not None and not warned
        if (step % settings.checkpoint_every == 0 or leaving) and step < settings.steps:
            began, warned = time.monotonic(), warned or leaving
            write_keys(run, keys, rank, world)
            validation = settings.validate_every > 0 and step % settings.validate_every == 0
            # Ray Train takes a missing number for the best one there is, and none that is no number.
            told = {"step": step, "loss": metrics["loss"], "validation_loss": math.nan}
            saver.save(told, step, history, validation)
            diary.clock.spend("checkpoint", began)
        asked = time.monotonic()
    saver.arrived.wait()

    # 5. The model folder.
    write_keys(run, keys, rank, world)
    weights = gather_whole(adapted) if sharded or precision != torch.float32 else None
    if rank == 0:
        diary.close()
        used = dataset.used(feed.order, step * settings.batch_size)
        storage.write_json(f"{run}/log.json", {"parameters": counts, "history": history, "used": used})
        if weights is not None:
            fresh, _ = open_model(config["start"], settings.image_size)
            adapted = stages.prepare(fresh, trains, settings.lora)
            set_weights(adapted, weights)
        export(adapted, processor, f"{run}/model")
    ray.train.report({"step": step})


def precision_of(settings: stages.Stage) -> torch.dtype:
    return torch.bfloat16 if settings.precision == "bf16" else torch.float32


def equipped(
    owl: OwlForConditionalGeneration, trains: stages.Trains, settings: stages.Stage, device: torch.device, world: int
) -> tuple[nn.Module, bool]:
    """The model as the step takes it: what trains unfrozen, LoRA around it, on its device, compiled and shared out
    where asked for; and whether it is shared out."""
    adapted = stages.prepare(owl, trains, settings.lora)
    stages.train_mode(owl, trains)
    stages.freeze_in(owl, precision_of(settings))
    if settings.checkpoint_activations:
        stages.checkpoint_activations(owl)
    adapted.to(device)
    language = owl.model.language_model
    drops = getattr(language.config, "attention_dropout", 0.0)  # which that kernel does not
    if settings.pack_tokens and device.type == "cuda" and precision_of(settings) == torch.bfloat16 and not drops:
        language.set_attn_implementation(packed.register())
    if settings.compile_layers:
        for layer in layers_of(adapted):
            layer.compile()
    sharded = settings.sharding == "weights" and world > 1
    if sharded:
        shard(adapted, [] if trains.vision == "trains" else list(owl.model.vision_model.parameters()))
    return adapted, sharded


def feed_of(
    dataset: Dataset,
    owl: OwlForConditionalGeneration,
    processor: OwlProcessor,
    settings: stages.Stage,
    trains: stages.Trains,
    rank: int,
    world: int,
    sharded: bool,
) -> Feed:
    """What the settings say of order, rows and pictures."""
    looks = Looks(
        pictures=trains.pictures,
        crop=settings.crop,
        always=sharded and trains.pictures,
        encode=Frozen(owl) if trains.pictures and trains.vision == "frozen" else None,
        keep_bytes=settings.keep_megabytes << 20,
    )
    return Feed(
        dataset,
        processor,
        dataset.order(settings.seed, settings.weights),
        settings.batch_size,
        rank=rank,
        world=world,
        micro_batch=settings.micro_batch,
        pack_tokens=settings.pack_tokens,
        max_tokens=settings.max_tokens,
        looks=looks,
        threads=max(1, int(settings.cpus_per_worker)),
    )


def open_model(folder: str, side: int) -> tuple[OwlForConditionalGeneration, OwlProcessor]:
    """A model to begin from, with its processor; for pictures of ``side`` px, unless that is 0."""
    with storage.local_folder(folder) as here:
        owl = OwlForConditionalGeneration.from_pretrained(here, dtype=torch.float32)
        processor = OwlProcessor.from_pretrained(here)
    if side and side != processor.image_processor.image_size:
        try:
            resize_pictures(owl, side)
        except ValueError as error:
            raise OwlError(f"image_size {side} does not fit {folder}: {error}") from None
        processor.image_processor.image_size = side
    return owl, processor


SECONDS_BETWEEN_LOOKS = 5
"""Asking Ray Train whether a machine is to be reclaimed takes a round trip of all workers."""


def agreed(wish: bool, device: torch.device) -> bool:
    """Whether any rank wishes it: the same on all."""
    return bool(summed(torch.tensor([float(wish)]), device).item())


def write_keys(run: str, keys: dict[int, list[str]], rank: int, world: int) -> None:
    """The samples of this rank's steps since the last time, and forgets them."""
    if keys:
        storage.write_json(f"{run}/keys/{min(keys):08d}-{max(keys):08d}-{rank}of{world}.json", keys)
        keys.clear()


def refuse_packing(owl: OwlForConditionalGeneration, processor: OwlProcessor) -> None:
    """Raises OwlError where the language model does not tell packed samples apart by their positions (ALiBi, learned
    positions): they would see each other."""
    ids = [i for i in range(owl.config.text_config.vocab_size) if i != owl.config.image_token_id][:12]
    one, two = Encoded(ids[:5], ids[:5], 0), Encoded(ids[5:], ids[5:], 0)
    with torch.no_grad():
        together = processor.pack([[one, two]])
        places = {"position_ids": together["position_ids"], "use_cache": False}
        packed = owl.eval()(input_ids=together["input_ids"], **places).logits[0]
        apart = torch.cat([owl(input_ids=torch.tensor([each.ids])).logits[0] for each in (one, two)])
    if not torch.allclose(packed, apart, atol=1e-3):
        raise OwlError("pack_tokens does not fit this language model: packed samples would see each other; set it to 0")


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost lists of layers."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            inside |= set(module.modules())
            yield from module


def patches_of(owl: OwlForConditionalGeneration) -> int:
    vision = owl.config.vision_config
    side, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    return (side // patch) ** 2 + 1 if isinstance(side, int) and isinstance(patch, int) else PATCHES


def shard(model: nn.Module, whole: list[nn.Parameter]) -> None:
    """Every worker holds a part of each layer (FSDP2), and gathers it when it is needed; all but ``whole``, which the
    feed uses by itself."""
    for layer in layers_of(model):
        if not set(layer.parameters()) & set(whole):
            fully_shard(layer)
    fully_shard(model, ignored_params=set(whole))


class Frozen:
    """Pixels [N, 3, H, W] → features [N, P, D] of a vision encoder that does not train."""

    def __init__(self, owl: OwlForConditionalGeneration):
        self.model = owl.model

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.get_vision_features(pixels.to(self.model.device, non_blocking=True))


def export(model: nn.Module, processor: OwlProcessor, folder: str) -> None:
    """Writes a folder that ``from_pretrained`` opens, with LoRA merged into the language model; local or remote."""
    owl = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    with storage.folder_for(folder) as here:
        owl.save_pretrained(here)
        processor.save_pretrained(here)
    storage.write_text(f"{folder}/finished", "")
