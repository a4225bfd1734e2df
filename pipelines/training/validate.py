"""How a checkpoint does on samples that nothing learns from: run by Ray Train beside the training workers."""

from __future__ import annotations

import base64
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from ray.train import Checkpoint

from owl_model import OwlForConditionalGeneration
from owl_model.answering import answer
from pipelines import storage
from pipelines.records import images_in, parts
from pipelines.training import stages
from pipelines.training.dataset import Dataset
from pipelines.training.feed import Feed, Looks
from pipelines.training.loop import open_model
from pipelines.training.order import Order
from pipelines.training.state import set_weights

SHOWN = 6
AT_ONCE = 16


def validate(checkpoint: Checkpoint, *, stage: str, settings: dict, run: str, start: str) -> dict[str, Any]:
    """Loss a supervised token on some samples of ``settings.validation``, and answers to a few of them, which go to
    RUN/validation with their pictures. Ray Train's ValidationFn."""
    chosen = stages.Stage.model_validate(settings)
    trains = chosen.trains(stage)
    owl, processor = open_model(start, chosen.image_size)
    model = stages.prepare(owl, trains, chosen.lora)
    state = {"model": {name: p for name, p in model.named_parameters() if p.requires_grad}}
    with checkpoint.as_directory() as folder:
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    set_weights(model, state["model"])
    owl.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    dataset = Dataset(chosen.validation)
    order = Order(dataset.rows, seed=0)
    count = min(chosen.validation_samples, len(order))
    looks = Looks(pictures=trains.pictures)
    feed = Feed(dataset, processor, order, count, micro_batch=AT_ONCE, max_tokens=chosen.max_tokens, looks=looks)
    total = tokens = 0.0
    with torch.no_grad():
        for batch in feed.batch(0):
            inputs = {name: value.to(owl.device) for name, value in batch.inputs.items()}
            total += owl(**inputs).token_losses.double().sum().item()
            tokens += batch.supervised
    step = int(storage.name_of(checkpoint.path).rpartition("_")[2])
    told = [told_of(feed, owl, position) for position in range(min(SHOWN, count))] if trains.pictures else []
    result = {"step": step, "validation_loss": total / max(tokens, 1), "samples": count}
    storage.write_json(f"{run}/validation/{step:08d}.json", {**result, "answers": told})
    return result


def told_of(feed: Feed, owl: OwlForConditionalGeneration, position: int) -> dict[str, Any]:
    """A sample's last question, what the model answers and what was expected, with its picture."""
    place = feed.order.at(position)
    row = feed.dataset.read(place.shard, place.row)
    messages = feed.conversation(row, position, place.epoch)
    last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
    images = [image for image in (row["image"], *(row["more_images"] or [])) if image][: images_in(messages[:last])]
    (text,) = answer(owl, feed.processor, [messages[:last]], [images], max_new_tokens=40)
    asked = [part["text"] for part in parts(messages[last - 1]["content"]) if part["type"] == "text"]
    picture = base64.b64encode(images[0]).decode() if images else None
    expected = " ".join(part["text"] for part in parts(messages[last]["content"]))
    return {"key": row["key"], "asked": " ".join(asked), "answer": text, "expected": expected, "picture": picture}
