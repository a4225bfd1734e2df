"""What the papers' shapes cost on this machine's device, with random weights: a step of training, and an answer's
tokens. Each is held against what the device reaches by itself: its rate of matrix products, its rate of reading."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, GenerationConfig

from jobs.bench_curation_set import WORDS
from jobs.bench_engines import PRECISIONS, spread
from jobs.bench_training import pairs
from jobs.doctor import config_of, planned, training_memory
from jobs.recipes import Recipe
from owl_model import OwlConfig, OwlForConditionalGeneration, OwlProcessor
from owl_model.processing import OwlImageProcessor
from pipelines import storage
from pipelines.records import CURATED
from pipelines.serving.batching import Batching
from pipelines.serving.engine import Ask, Picture, Sampling
from pipelines.serving.options import Room
from pipelines.settings import OwlError
from pipelines.training.dataset import Dataset
from pipelines.training.loop import equipped, feed_of, precision_of
from pipelines.training.stages import Stage
from pipelines.training.step import build_optimizers, train_step
from pipelines.training.watch import matrix_rate


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fresh(config: OwlConfig, dtype: torch.dtype) -> OwlForConditionalGeneration:
    """Random weights, drawn on the device."""
    with device_here():
        return OwlForConditionalGeneration._from_config(config, dtype=dtype)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPUs"


# --- a step of training ----------------------------------------------------------------------------------------------

WARM = 3
"""Steps that do not count."""


def write_talk(folder: str, pairs: str) -> None:
    """Conversations of a question and an answer of 100 to 300 words, every other one about a picture of ``pairs``."""
    if Path(f"{folder}/manifest.json").exists():
        return
    draw = np.random.default_rng(0)
    paths = storage.listing(f"{pairs}/shards", ".arrow")
    table = pa.concat_tables([storage.open_arrow(path).read_all() for path in paths]).to_pylist()
    for number, row in enumerate(table):
        shown = [{"type": "image", "text": None}] if number % 2 else []
        question, answer = (" ".join(draw.choice(WORDS, size=draw.integers(*size))) for size in ((5, 30), (100, 300)))
        row |= {
            "caption": None,
            "messages": [
                {"role": "user", "content": [*shown, {"type": "text", "text": question}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
            **({} if shown else {"image": None, "sha256": None}),
        }
    storage.write_arrow(f"{folder}/shards/00000.arrow", pa.Table.from_pylist(table, schema=CURATED))
    storage.write_json(f"{folder}/manifest.json", {"shards": [{"shard": "00000", "kept": len(table)}]})


def measure_step(folder: str, name: str, recipe: Recipe, steps: int) -> dict[str, Any]:
    """The trainer's own feed, model and step, without Ray around them. Operations are counted by PyTorch, recomputed
    ones left out."""
    arrow = pairs(folder, 600)
    write_talk(f"{folder}/talk", arrow)
    device, stage = device_here(), recipe.train
    settings: Stage = getattr(recipe, stage.removeprefix("owl2_"))
    settings = settings.model_copy(update={"data": [f"{folder}/talk" if "stage2" in stage else arrow]})
    config, trains = planned(recipe, settings, ""), settings.trains(stage)
    pictures = OwlImageProcessor(config.vision_config.image_size)
    words = AutoTokenizer.from_pretrained(f"{folder}/language")
    processor = OwlProcessor.for_model(config, pictures, words, "plain")
    needs, _ = training_memory(planned(recipe, settings, ""), stage, settings)
    peak = matrix_rate(device, precision_of(settings))
    owl = fresh(config, torch.float32)
    model, _ = equipped(owl, trains, settings, device, world=1)
    optimizers = build_optimizers(model, settings.optimization)
    feed = feed_of(Dataset(settings.data), owl, processor, settings, trains, 0, 1, sharded=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    counter, each = FlopCounterMode(display=False), 0.0
    rows: list[dict[str, float]] = []
    began = time.monotonic()
    for number, batches in enumerate(feed.batches(0, WARM + steps)):
        wait = time.monotonic() - began
        encoded = [feed.encoded(batch) for batch in batches]
        given = (model, encoded, optimizers, settings.optimization, 0.1, precision_of(settings))
        if number == 0 and not settings.compile_layers:
            with counter:
                metrics = train_step(*given)
            again = settings.checkpoint_activations  # forward twice, backward twice as much
            each = counter.get_total_flops() * (0.75 if again else 1) / (metrics["tokens"] + metrics["padding"])
        else:
            metrics = train_step(*given)
        now = time.monotonic()
        rows.append({"seconds": now - began, "wait": wait, **{name: metrics[name] for name in COUNTED}})
        began = now
    rows = rows[WARM:]
    middle = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    seconds, all_of_them = middle["seconds"], middle["tokens"] + middle["padding"]
    told = {
        "device": name_of(device),
        "recipe": name,
        "batch": settings.batch_size,
        "micro_batch": settings.micro_batch,
        "compiled": settings.compile_layers,
        "recomputed": settings.checkpoint_activations,
        "step_s": round(seconds, 4),
        "samples_per_second": round(settings.batch_size / seconds, 1),
        "pictures_per_second": round(middle["pictures"] / seconds, 1),
        "tokens_per_second": round(middle["tokens"] / seconds),
        "tokens_a_sample": round(middle["tokens"] / settings.batch_size, 1),
        "padding": round(middle["padding"] / all_of_them, 3),
        "wait": round(sum(row["wait"] for row in rows) / sum(row["seconds"] for row in rows), 4),
        "matrix_rate_tflops": round(peak / 1e12, 1),
        "loss": round(metrics["loss"], 3),
        "memory_predicted_gb": {name: round(size / 1e9, 2) for name, size in needs.items()},
    }
    if each:
        told |= {"tflops": round(each * all_of_them / seconds / 1e12, 1)}
        told |= {"share_of_peak": round(each * all_of_them / seconds / peak, 3)}
    if device.type == "cuda":
        told |= {"memory_allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}
        told |= {"memory_reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2)}
    return told


COUNTED = ("tokens", "padding", "pictures")

# --- an answer's tokens ----------------------------------------------------------------------------------------------


class Asking:
    """An engine of random weights, asked as a gateway asks it."""

    def __init__(self, owl: OwlForConditionalGeneration, room: Room):
        self.owl, self.engine, self.asked = owl, Batching(owl, 2, room), 0
        self.draw = np.random.default_rng(0)

    async def ask(self, words: int, new: int, pictures: Sequence[np.ndarray] = ()) -> tuple[float, float]:
        """Seconds to the first token, and to each later one. No prompt is like another."""
        self.asked += 1
        config = self.owl.config
        shown = [Picture(f"{hash(pixels.tobytes())}", pixels) for pixels in pictures]
        ids = [config.image_token_id] * (config.visual_tokens * len(shown))
        ids = [1, *ids, *self.draw.integers(10, config.text_config.vocab_size - 10, words - 1).tolist()]
        began = time.monotonic()
        first = made = 0.0
        async for step in self.engine.submit(Ask(f"{self.asked}", ids, shown, Sampling(ignore_end=True), new)):
            first = first or time.monotonic() - began
            made += len(step.tokens)
        if made != new:
            raise OwlError(f"{made:g} tokens came, of {new}")
        return first, (time.monotonic() - began - first) / (new - 1)

    async def turn(self, clients: int, words: int, new: int) -> list[tuple[float, float]]:
        return await asyncio.gather(*(self.ask(words, new) for _ in range(clients)))


def reading_rate(device: torch.device) -> float:
    """Bytes a second of a copy on the device, read and written."""
    source = torch.zeros((1 << 31) if device.type == "cuda" else (1 << 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        wait_for(device)
        began = time.monotonic()
        target.copy_(source)
        wait_for(device)
        best = min(best, time.monotonic() - began)
    return 2 * len(source) / best


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def bytes_a_step(owl: OwlForConditionalGeneration, clients: int, context: int) -> int:
    """What a step of next tokens cannot but read: the language model's weights, and everyone's keys and values."""
    text, size = owl.config.text_config, owl.dtype.itemsize
    words = owl.get_input_embeddings().weight.numel()
    weights = sum(p.numel() for p in (*owl.model.language_model.parameters(), *owl.lm_head.parameters())) - words
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    kept = 2 * text.num_hidden_layers * heads * (text.hidden_size // text.num_attention_heads)
    return size * (weights + clients * context * kept)


def measure_engine(
    preset: str, precision: str, clients: list[int], words: int, new: int, repeats: int, compiled: bool
) -> Iterator[dict[str, Any]]:
    """The built-in engine by itself. Medians over ``repeats`` turns after one that does not count."""
    device = device_here()
    rate = reading_rate(device)
    owl = fresh(config_of(preset), getattr(torch, PRECISIONS[precision])).eval()
    room = Room(tokens=max(clients) * 2 * (words + new), requests=max(clients), queue=max(clients), compile=compiled)
    began = time.monotonic()

    async def run() -> list[dict[str, Any]]:
        asking = Asking(owl, room)
        started, told = time.monotonic() - began, []
        try:
            for count in clients:
                turns = [await asking.turn(count, words, new) for _ in range(repeats + 1)][1:]
                bound = bytes_a_step(owl, count, words + new // 2) / rate
                each = [one[1] for turn in turns for one in turn]
                told.append({"clients": count, "TTFT ms": spread([one[0] for turn in turns for one in turn])})
                told[-1] |= {"TPOT ms": spread(each), "bound ms": round(1000 * bound, 2)}
                told[-1] |= {"share of bound": round(bound / statistics.median(each), 3)}
                told[-1] |= {"tokens a second": round(count / statistics.median(each), 1)}
            side = owl.config.vision_config.image_size
            first, again = [], []
            for _ in range(repeats + 1):
                pixels = asking.draw.normal(size=(3, side, side)).astype(np.float32)
                first.append((await asking.ask(32, 2, [pixels]))[0])
                again.append((await asking.ask(32, 2, [pixels]))[0])
            told.append({"with one picture": "first asked about", "TTFT ms": spread(first[1:])})
            told.append({"with one picture": "asked about again", "TTFT ms": spread(again[1:])})
        finally:
            asking.engine.stop()
        shape = {"device": name_of(device), "preset": preset, "precision": precision, "compiled": compiled}
        shape |= {"prompt": words, "answer": new, "started_s": round(started, 1), "copy_tb_s": round(rate / 1e12, 3)}
        return [{**shape, **row} for row in told]

    yield from asyncio.run(run())
    owl.model.language_model.set_attn_implementation("sdpa")
    chosen = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=new)
    ids = torch.randint(10, 100, (1, words), device=device)
    seconds = []
    for _ in range(2):
        wait_for(device)
        began = time.monotonic()
        with torch.inference_mode():
            owl.generate(ids, attention_mask=torch.ones_like(ids), generation_config=chosen)
        wait_for(device)
        seconds.append(time.monotonic() - began)
    yield {"transformers' generate, one client": "ms a token", "ms": round(1000 * seconds[-1] / new, 2)}
