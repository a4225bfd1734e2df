"""Conversations with pictures → answers: what evaluation and serving both call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

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


class StopStrings(StoppingCriteria):
    """Ends each row once its new text holds a stop string. transformers' own fails where a tokenizer lacks letters."""

    def __init__(self, stops: Sequence[str], tokenizer, prompt_length: int):
        self.stops, self.tokenizer, self.prompt_length = stops, tokenizer, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self.stops) for text in texts], device=input_ids.device)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop string in it."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


@torch.no_grad()
def answer(
    owl: OwlForConditionalGeneration,
    processor: OwlProcessor,
    conversations: Sequence[Sequence[dict]],
    images: Sequence[Sequence],
    videos: Sequence[Sequence] | None = None,
    stop_strings: Sequence[str] = (),
    **options,
) -> list[str]:
    """One answer for each conversation, decoded in one batch, up to the first of ``stop_strings``. ``options`` as of
    `GenerationConfig`."""
    inputs = prompt_inputs(processor, conversations, images, videos)
    length = inputs["input_ids"].shape[1]
    stops = StoppingCriteriaList([StopStrings(stop_strings, processor.tokenizer, length)] if stop_strings else [])
    config = generation_config(owl, processor, **options)
    tokens = owl.generate(**inputs, generation_config=config, stopping_criteria=stops)
    texts = processor.tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)
    return [before_stop(text, stop_strings).strip() for text in texts]
