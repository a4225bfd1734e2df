"""Scores by models whose folders are given: CLIP's fit of caption and picture, an aesthetic head on its embedding, and
classifiers for what is unsafe or watermarked.

A pool of actors, each with its models loaded once, reads curated shards, where pictures are small already, and writes
``scores/ID.parquet``; verdicts are read from these afterwards, so that a threshold can be moved both ways. Every stored
row is scored, also those that turn out to be duplicates.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data

from owl_model.images import decode, open_header
from pipelines import storage
from pipelines.progress import progress
from pipelines.records import SCORES
from pipelines.settings import OwlError, Settings

if TYPE_CHECKING:
    import torch


class Scoring(Settings):
    image_text: str = ""
    """Folder of a CLIP or SigLIP: the cosine of picture and caption; its embeddings are kept."""
    aesthetic: str = ""
    """Weights of linear layers on `image_text`'s embedding (.safetensors, or .pth as LAION's): one number."""
    unsafe: str = ""
    """Folder of an image classifier; the score is the probability of `unsafe_label`."""
    unsafe_label: str = "nsfw"
    """Name of that classifier's label."""
    watermark: str = ""
    """Folder of an image classifier; the score is the probability of `watermark_label`."""
    watermark_label: str = "watermark"
    """Name of that classifier's label."""
    workers: int = 1
    """Actors, each with all of these models."""
    gpus_per_worker: float = 0.0
    """GPUs of each actor; 0 computes on the CPU."""
    batch_size: int = 64
    """Pictures scored at once."""

    @property
    def wanted(self) -> bool:
        return bool(self.image_text or self.unsafe or self.watermark)


def score(output: str, shards: list[str], settings: Scoring) -> None:
    """Scores those curated shards that have no scores yet."""
    done = {storage.name_of(path) for path in storage.listing(f"{output}/scores", ".parquet")}
    work = [{"shard": shard} for shard in shards if f"{shard}.parquet" not in done]
    if not work:
        return
    with progress("score", len(shards), "shards", done=len(shards) - len(work)) as counter:
        scored = ray.data.from_items(work, override_num_blocks=min(len(work), 16 * settings.workers)).map_batches(
            Scorer,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=settings.workers),
            num_gpus=settings.gpus_per_worker,
            fn_constructor_kwargs={"output": output, "settings": settings.model_dump(), "counter": counter},
        )
        for _ in scored.iter_batches(batch_size=None):
            pass


def refuse_missing(settings: Scoring) -> None:
    """Raises OwlError where a file or folder that is named is not there."""
    for name in ("image_text", "aesthetic", "unsafe", "watermark"):
        path = getattr(settings, name)
        if path and not storage.exists(path):
            raise OwlError(f"scoring.{name} names {path}, which is not there")


class Scorer:
    """One actor of the pool."""

    def __init__(self, output: str, settings: dict, counter: ray.actor.ActorHandle):
        import torch

        self.output, self.settings, self.counter = output, Scoring(**settings), counter
        self.device = torch.device("cuda" if self.settings.gpus_per_worker else "cpu")
        self.clip = (
            Clip(self.settings.image_text, self.settings.aesthetic, self.device) if self.settings.image_text else None
        )
        self.classifiers = {
            name: Classifier(getattr(self.settings, name), getattr(self.settings, f"{name}_label"), self.device)
            for name in ("unsafe", "watermark")
            if getattr(self.settings, name)
        }

    def __call__(self, work: pa.Table) -> pa.Table:
        for shard in work["shard"].to_pylist():
            rows = [row for batch in self.batches(shard) for row in self.scores(batch)]
            storage.write_parquet(f"{self.output}/scores/{shard}.parquet", pa.Table.from_pylist(rows, schema=SCORES))
            self.counter.advance.remote(1)
        return work

    def batches(self, shard: str) -> Iterator[list[dict]]:
        """Curated rows with a picture, as {"row", "image", "caption"}."""
        table = storage.read_arrow(f"{self.output}/shards/{shard}.arrow").select(["image", "caption"])
        for start in range(0, len(table), self.settings.batch_size):
            rows = table.slice(start, self.settings.batch_size).to_pylist()
            found = [{"row": start + index, **row} for index, row in enumerate(rows) if row["image"] is not None]
            if found:
                yield found

    def scores(self, rows: list[dict]) -> list[dict]:
        images = [decode(open_header(row["image"])) for row in rows]
        scored: list[dict] = [{"row": row["row"]} for row in rows]
        if self.clip:
            for item, values in zip(scored, self.clip(images, [row["caption"] or [] for row in rows]), strict=True):
                item |= values
        for name, classifier in self.classifiers.items():
            for item, value in zip(scored, classifier(images), strict=True):
                item[name] = value
        return scored


class Clip:
    """A given CLIP, and a head on its picture embeddings where one is given."""

    def __init__(self, folder: str, head: str, device: torch.device):
        from transformers import AutoModel, AutoProcessor

        self.device = device
        self.model = AutoModel.from_pretrained(folder).eval().to(device)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.layers = [(weight.to(device), bias.to(device)) for weight, bias in linear_layers(head)]

    def see(self, images: list) -> torch.Tensor:
        """[N, D] of length 1."""
        inputs = self.processor(images=images, return_tensors="pt").to(self.device)
        return unit(self.model.get_image_features(**inputs))

    def read(self, texts: list[str]) -> torch.Tensor:
        """[N, D] of length 1."""
        inputs = self.processor(text=texts, return_tensors="pt", padding=True, truncation=True)
        return unit(self.model.get_text_features(**inputs.to(self.device)))

    def __call__(self, images: list, captions: list[list[str]]) -> list[dict[str, Any]]:
        """{"embedding", "image_text", "aesthetic"} of each picture; of several captions, the best one counts."""
        import torch

        texts = [caption for each in captions for caption in each]
        with torch.inference_mode():
            seen = self.see(images)
            cosines = seen.new_zeros(0)
            if texts:
                told = self.read(texts)
                owner = torch.tensor([index for index, each in enumerate(captions) for _ in each], device=self.device)
                cosines = (told * seen[owner]).sum(-1)
            pleasing = seen
            for weight, bias in self.layers:
                pleasing = pleasing @ weight.T + bias
        spoken = iter(cosines.tolist())
        fits = [max((next(spoken) for _ in each), default=None) for each in captions]
        rows: list[dict[str, Any]] = [
            {"embedding": vector, "image_text": fit}
            for vector, fit in zip(seen.cpu().numpy().astype("float16"), fits, strict=True)
        ]
        if self.layers:
            for row, value in zip(rows, pleasing[:, 0].tolist(), strict=True):
                row["aesthetic"] = value
        return rows


def unit(features: Any) -> torch.Tensor:
    """[N, D] of length 1."""
    vectors = getattr(features, "pooler_output", features).float()
    return vectors / vectors.norm(dim=-1, keepdim=True)


def linear_layers(path: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(weight, bias) of each linear layer in a file of weights, in order; empty for no path. Raises OwlError where they
    do not end in one number."""
    if not path:
        return []
    import torch
    from safetensors.torch import load

    with storage.open_read(path) as file:
        safe = posixpath.splitext(path)[1] == ".safetensors"
        weights = load(file.read()) if safe else torch.load(file, weights_only=True, map_location="cpu")
    names = sorted((name for name in weights if name.endswith("weight")), key=natural)
    layers = [(weights[name].float(), weights[name.removesuffix("weight") + "bias"].float()) for name in names]
    if not layers or layers[-1][0].shape[0] != 1:
        raise OwlError(f"scoring.aesthetic {path} holds no linear layers that end in one number")
    return layers


def natural(name: str) -> list[int]:
    """The numbers in a layer's name, by which layers are in order."""
    return [int(part) for part in name.split(".") if part.isdigit()]


class Classifier:
    """Probabilities of one label."""

    def __init__(self, folder: str, label: str, device: torch.device):
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.model = AutoModelForImageClassification.from_pretrained(folder).eval().to(device)
        self.processor = AutoImageProcessor.from_pretrained(folder)
        known = {name.lower(): number for number, name in self.model.config.id2label.items()}
        if label.lower() not in known:
            raise OwlError(f"{folder} knows no label {label!r}; it has {', '.join(sorted(known))}")
        self.label, self.device = known[label.lower()], device

    def __call__(self, images: list) -> list[float]:
        import torch

        with torch.inference_mode():
            inputs = self.processor(images=images, return_tensors="pt").to(self.device)
            return self.model(**inputs).logits.softmax(-1)[:, self.label].tolist()
