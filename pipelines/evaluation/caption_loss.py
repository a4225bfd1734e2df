"""Does the model look? Loss of true captions with the right picture, and with another: paired, with an interval.

For each caption of each picture: the mean negative log-likelihood a token, given its own picture and given the next
picture's. The interval is a bootstrap over pictures, as captions of one picture are not independent.
"""

from __future__ import annotations

import numpy as np
import ray
import torch

from owl_model import OwlForConditionalGeneration, OwlProcessor
from pipelines import storage
from pipelines.curation.sources import find_shards, read_shard
from pipelines.evaluation.evaluate import Evaluation
from pipelines.evaluation.metrics import bootstrap_interval
from pipelines.progress import progress
from pipelines.records import caption_messages
from pipelines.settings import OwlError


def compare_losses(model: str, raw: list[str], output: str, settings: Evaluation) -> dict:
    """Returns {"right", "wrong", "difference" (wrong - right), "interval", "pictures", "captions"}."""
    if not storage.exists(f"{model}/config.json"):
        raise OwlError(f"no model folder at {model!r}: it has no config.json")
    samples = [s for path in find_shards(raw) for s in read_shard(path) if s.images and s.captions and not s.reason]
    if len(samples) < 2:
        raise OwlError(f"{len(samples)} usable samples in {', '.join(raw)}: a comparison needs two at least")
    pictures = [sample.images[0] for sample in samples]
    wrong = pictures[1:] + pictures[:1]
    with progress("compare", len(samples), "pictures") as counter:
        actor = Scorer.options(num_cpus=settings.cpus_per_actor)  # type: ignore[attr-defined]
        scorers = [actor.remote(model) for _ in range(settings.actors)]
        work = [
            scorers[i % len(scorers)].score.remote(s.captions, pictures[i], wrong[i], counter)
            for i, s in enumerate(samples)
        ]
        rows = [(i, *pair) for i, pairs in enumerate(ray.get(work)) for pair in pairs]
    group, right, other = (np.array(column) for column in zip(*rows, strict=True))
    difference = other - right
    results = {
        "right": float(right.mean()),
        "wrong": float(other.mean()),
        "difference": float(difference.mean()),
        "interval": bootstrap_interval(difference, group),
        "pictures": len(samples),
        "captions": len(rows),
        "model": model,
    }
    storage.write_json(f"{output}/results.json", results)
    return results


@ray.remote
class Scorer:
    def __init__(self, model: str):
        self.owl = OwlForConditionalGeneration.from_pretrained(model).eval()
        self.processor = OwlProcessor.from_pretrained(model)

    @torch.no_grad()
    def score(self, captions: list[str], right: bytes, wrong: bytes, counter) -> list[tuple[float, float]]:
        """(loss a token with the right picture, with the wrong one) of each caption."""
        pixels = torch.stack([self.processor.image_processor.pixels(data) for data in (right, wrong)])
        features = self.owl.model.get_vision_features(pixels)
        pairs = []
        for caption in captions:
            inputs = self.processor.collate([self.processor.encode(caption_messages(caption.strip()))])
            losses = [self.owl(**inputs, vision_features=features[i : i + 1]).loss.item() for i in (0, 1)]
            pairs.append((losses[0], losses[1]))
        counter.advance.remote(1)
        return pairs
