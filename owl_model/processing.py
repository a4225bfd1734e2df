"""OwlProcessor = images + chat: a conversation with its pictures → the model's inputs.

encode   one conversation → ids, labels, number of pictures
collate  encoded conversations and their pixels → a padded batch
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from owl_model.chat import IGNORE, TEMPLATES, Encoded, Template, encode, end_of_answer
from owl_model.config import OwlConfig
from owl_model.images import CLIP_MEAN, CLIP_STD, FITS, decode, open_image, spread_frames, to_pixels


class OwlImageProcessor(BaseImageProcessor):
    """Picture → [3, S, S] float32, S = ``image_size``: made square as ``fit`` (images.FITS) says, 1/255,
    (x - mean) / std."""

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        image_size: int = 224,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        resample: int = 3,
        fit: str = "squash",
        **kwargs,
    ):
        super().__init__(**kwargs)
        if fit not in FITS:
            raise ValueError(f"unknown fit {fit!r}; known: {', '.join(FITS)}")
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.resample = resample
        self.fit = fit

    @classmethod
    def from_backbone(cls, settings: dict) -> OwlImageProcessor:
        """From the contents of a vision backbone's ``preprocessor_config.json``."""
        size = settings.get("crop_size") or settings["size"]
        if isinstance(size, dict):
            size = size.get("height") or size["shortest_edge"]
        return cls(size, settings["image_mean"], settings["image_std"], settings.get("resample", 3))

    def preprocess(self, images, return_tensors=None, **kwargs) -> BatchFeature:
        images = images if isinstance(images, (list, tuple)) else [images]
        return BatchFeature({"pixel_values": torch.stack([self.pixels(image) for image in images])})

    def __call__(self, images, **kwargs) -> BatchFeature:
        return self.preprocess(images, **kwargs)

    def pixels(self, image: Image.Image | bytes, augment: Callable[[Image.Image], Image.Image] | None = None):
        """One picture (or its encoded bytes) → [3, S, S], changed by ``augment`` before it is made square."""
        image = open_image(image) if isinstance(image, bytes) else decode(image)
        image = augment(image) if augment else image
        mean, std = self.image_mean, self.image_std
        return torch.from_numpy(to_pixels(image, self.image_size, mean, std, self.resample, self.fit))

    def frames(self, video: Sequence[Image.Image | bytes], wanted: int) -> torch.Tensor:
        """A video as a sequence of pictures → [T, 3, S, S], T = ``wanted`` frames spread over it."""
        return torch.stack([self.pixels(video[index]) for index in spread_frames(len(video), wanted)])


class OwlProcessor(ProcessorMixin):
    """Saved beside the weights, so that a model folder holds its own preprocessing and its own template."""

    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "OwlImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_token_id: int = 0,
        video_token_id: int = 0,
        visual_tokens: int = 65,
        frames: int = 4,
        template: dict | None = None,
        **kwargs,
    ):
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.visual_tokens = visual_tokens
        self.frames = frames
        self.template = vars(Template(**template)) if template else vars(TEMPLATES["owl1"])
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_pretrained(cls, folder, **kwargs) -> OwlProcessor:
        """As of transformers; for a folder of the authors', which holds no processor, theirs is put together."""
        if (Path(folder) / "processor_config.json").exists() or not Path(folder).is_dir():
            return super().from_pretrained(folder, **kwargs)
        config = OwlConfig.from_pretrained(folder)
        second = config.modality_adaptive
        pictures = OwlImageProcessor(config.vision_config.image_size, fit="squash_twice" if second else "squash")
        tokenizer = legacy_tokenizer(AutoTokenizer.from_pretrained(folder))
        return cls.for_model(config, pictures, tokenizer, "owl2" if second else "owl1")

    @classmethod
    def _get_arguments_from_pretrained(cls, folder, processor_dict=None, **kwargs):
        """transformers' hook for the parts of a saved processor: the image processor is ours, the tokenizer any."""
        pictures = dict((processor_dict or {})["image_processor"])
        pictures.pop("image_processor_type", None)
        return [OwlImageProcessor(**pictures), AutoTokenizer.from_pretrained(folder)]

    @classmethod
    def for_model(cls, config: OwlConfig, image_processor, tokenizer, template: str | dict) -> OwlProcessor:
        """A processor that fits a model's configuration; ``template`` is a name of chat.TEMPLATES, or one's own as
        a dict of chat.Template's fields."""
        if isinstance(template, str):
            if template not in TEMPLATES:
                raise ValueError(f"unknown template {template!r}; known: {', '.join(TEMPLATES)}")
            template = vars(TEMPLATES[template])
        return cls(
            image_processor,
            tokenizer,
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            visual_tokens=config.visual_tokens,
            template=template,
        )

    def encode(self, messages: Sequence[dict], *, prompt: bool = False) -> Encoded:
        """A conversation as ids and labels; ``prompt`` ends it where the assistant would speak."""
        return encode(
            messages,
            self.tokenizer,
            Template(**self.template),
            media_ids={"image": self.image_token_id, "video": self.video_token_id},
            visual_tokens=self.visual_tokens,
            prompt=prompt,
        )

    @property
    def end_id(self) -> int:
        """The token that closes an answer."""
        return end_of_answer(self.tokenizer, Template(**self.template))

    def collate(self, batch: Sequence[Encoded], *, side: str = "right") -> dict[str, torch.Tensor]:
        """[B, L] ids, mask and labels, padded on ``side`` ("right" to train, "left" to generate)."""
        length = max(len(item.ids) for item in batch)
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for item in batch:
            gap = length - len(item.ids)
            for name, values, filler in (
                ("input_ids", item.ids, self.pad_id),
                ("attention_mask", [1] * len(item.ids), 0),
                ("labels", item.labels, IGNORE),
            ):
                padding = [filler] * gap
                rows[name].append(padding + values if side == "left" else values + padding)
        return {name: torch.tensor(values) for name, values in rows.items()}

    def pack(self, rows: Sequence[Sequence[Encoded]]) -> dict[str, torch.Tensor]:
        """[B, L] ids, positions and labels of several conversations a row, padded on the right. Positions start again
        with each conversation, which is how transformers' masks tell them apart where no attention mask is given; the
        padding is one more. A conversation's first token is nobody's next, and has no label."""
        length = max(sum(len(item.ids) for item in row) for row in rows)
        packed: dict[str, list[list[int]]] = {"input_ids": [], "position_ids": [], "labels": []}
        for row in rows:
            gap = length - sum(len(item.ids) for item in row)
            ids = [token for item in row for token in item.ids]
            labels = [label for item in row for label in (IGNORE, *item.labels[1:])]
            packed["input_ids"].append(ids + [self.pad_id] * gap)
            packed["position_ids"].append([i for item in row for i in range(len(item.ids))] + list(range(gap)))
            packed["labels"].append(labels + [IGNORE] * gap)
        return {name: torch.tensor(values) for name, values in packed.items()}

    @property
    def pad_id(self) -> int:
        """Masked wherever it stands, so any id serves where the tokenizer has no padding."""
        return 0 if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id


def legacy_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """LLaMA's SentencePiece tokenizer as the authors' transformers ran it: every piece gets a leading "▁", also one
    that begins with a space. Others come back untouched."""
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    return tokenizer


AutoProcessor.register(OwlConfig, OwlProcessor, exist_ok=True)
