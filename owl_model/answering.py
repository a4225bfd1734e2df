"""Conversations with pictures → answers: what evaluation and serving both call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from owl_model.modeling import OwlForConditionalGeneration
from owl_model.processing import OwlProcessor


def prompt_inputs(
    processor: OwlProcessor, conversations: Sequence[Sequence[dict]], images: Sequence[Sequence]
) -> dict[str, torch.Tensor]:
    """Left-padded ids and mask [B, L] and all pictures [N, 3, H, W], ready for ``generate``.

    ``images`` holds the pictures (PIL, or encoded bytes) of each conversation in reading order. Raises ValueError
    where their number is not that of the conversation's image parts.
    """
    encoded = [processor.encode(messages, prompt=True) for messages in conversations]
    for item, given in zip(encoded, images, strict=True):
        if item.images != len(given):
            raise ValueError(f"the conversation shows {item.images} pictures, but {len(given)} were given")
    inputs = processor.collate(encoded, side="left")
    del inputs["labels"]
    pictures = [processor.image_processor.pixels(image) for given in images for image in given]
    if pictures:
        inputs["pixel_values"] = torch.stack(pictures)
    return inputs


def generation_config(owl: OwlForConditionalGeneration, processor: OwlProcessor, **options) -> GenerationConfig:
    """Greedy unless ``options`` say otherwise; ends at the tokenizer's end of sequence."""
    chosen = {"do_sample": False, "eos_token_id": processor.tokenizer.eos_token_id, "pad_token_id": processor.pad_id}
    return GenerationConfig(**{**chosen, **options})


@torch.no_grad()
def answer(
    owl: OwlForConditionalGeneration,
    processor: OwlProcessor,
    conversations: Sequence[Sequence[dict]],
    images: Sequence[Sequence],
    **options,
) -> list[str]:
    """One answer for each conversation, decoded in one batch. ``options`` as of `GenerationConfig`."""
    inputs = prompt_inputs(processor, conversations, images)
    tokens = owl.generate(**inputs, generation_config=generation_config(owl, processor, **options))
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
