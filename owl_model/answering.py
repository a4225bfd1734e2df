"""Conversations with pictures → answers: what evaluation and serving both call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from owl_model.modeling import OwlForConditionalGeneration
from owl_model.processing import OwlProcessor


def prompt_inputs(
    processor: OwlProcessor,
    conversations: Sequence[Sequence[dict]],
    images: Sequence[Sequence],
    videos: Sequence[Sequence] | None = None,
) -> dict[str, torch.Tensor]:
    """Left-padded ids and mask [B, L], all pictures [N, 3, H, W] and videos [M, T, 3, H, W], ready for ``generate``.

    ``images`` holds the pictures (PIL, or encoded bytes) of each conversation in reading order, ``videos`` likewise
    its videos, each a sequence of pictures. Raises ValueError where their number is not that of the conversation's
    parts.
    """
    encoded = [processor.encode(messages, prompt=True) for messages in conversations]
    films = [[] for _ in conversations] if videos is None else videos
    for item, given, filmed in zip(encoded, images, films, strict=True):
        if item.images != len(given):
            raise ValueError(f"the conversation shows {item.images} pictures, but {len(given)} were given")
        if item.videos != len(filmed):
            raise ValueError(f"the conversation shows {item.videos} videos, but {len(filmed)} were given")
    inputs = processor.collate(encoded, side="left")
    del inputs["labels"]
    pictures = [processor.image_processor.pixels(image) for given in images for image in given]
    if pictures:
        inputs["pixel_values"] = torch.stack(pictures)
    moving = [processor.image_processor.frames(video, processor.frames) for filmed in films for video in filmed]
    if moving:
        inputs["pixel_values_videos"] = torch.stack(moving)
    return inputs


def generation_config(owl: OwlForConditionalGeneration, processor: OwlProcessor, **options) -> GenerationConfig:
    """Greedy unless ``options`` say otherwise; ends where the template ends an answer."""
    chosen = {"do_sample": False, "eos_token_id": processor.end_id, "pad_token_id": processor.pad_id}
    return GenerationConfig(**{**chosen, **options})


@torch.no_grad()
def answer(
    owl: OwlForConditionalGeneration,
    processor: OwlProcessor,
    conversations: Sequence[Sequence[dict]],
    images: Sequence[Sequence],
    videos: Sequence[Sequence] | None = None,
    **options,
) -> list[str]:
    """One answer for each conversation, decoded in one batch. ``options`` as of `GenerationConfig`, stop strings
    among them."""
    inputs = prompt_inputs(processor, conversations, images, videos)
    config = generation_config(owl, processor, **options)
    tokens = owl.generate(**inputs, generation_config=config, tokenizer=processor.tokenizer)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
