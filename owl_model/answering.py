"""Conversations with pictures → answers: what evaluation and serving both call."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence

import torch
from transformers import (
    BitsAndBytesConfig,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.utils import is_bitsandbytes_available

from owl_model.chat import Encoded
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


def on_device(owl: OwlForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(owl.device) for name, value in inputs.items()}


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
    inputs = on_device(owl, prompt_inputs(processor, conversations, images, videos))
    length = inputs["input_ids"].shape[1]
    stops = StoppingCriteriaList([StopStrings(stop_strings, processor.tokenizer, length)] if stop_strings else [])
    config = generation_config(owl, processor, **options)
    tokens = owl.generate(**inputs, generation_config=config, stopping_criteria=stops)
    texts = processor.tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)
    return [before_stop(text, stop_strings).strip() for text in texts]


@torch.no_grad()
def choice_log_likelihoods(
    owl: OwlForConditionalGeneration,
    processor: OwlProcessor,
    conversations: Sequence[Sequence[dict]],
    images: Sequence[Sequence],
    choices: Sequence[Sequence[str]],
) -> list[list[float]]:
    """log p(choice | conversation) of each of a conversation's choices as the assistant's next words, summed over their
    tokens; the token that would end the answer is left out. Choices of one token each, such as letters, share one pass
    over their conversation."""
    prompts = [processor.encode(messages, prompt=True) for messages in conversations]
    answers = [
        [processor.encode([*messages, {"role": "assistant", "content": choice}]).ids for choice in named]
        for messages, named in zip(conversations, choices, strict=True)
    ]
    ends = [[ids[len(prompt.ids) : -1] for ids in some] for prompt, some in zip(prompts, answers, strict=True)]
    pictures = [[processor.image_processor.pixels(image) for image in given] for given in images]
    if all(len(end) == 1 for some in ends for end in some):
        rows = [(prompt.ids, shown) for prompt, shown in zip(prompts, pictures, strict=True)]
        last = next_log_probabilities(owl, processor, rows, tail=1)
        return [[float(values[0, end[0]]) for end in some] for values, some in zip(last, ends, strict=True)]
    rows = [
        (prompt.ids + end, shown) for prompt, some, shown in zip(prompts, ends, pictures, strict=True) for end in some
    ]
    longest = max(len(end) for some in ends for end in some) + 1
    found = iter(next_log_probabilities(owl, processor, rows, tail=longest))
    sums = []
    for some in ends:
        values = [(next(found)[-len(end) - 1 : -1], end) for end in some]
        sums.append([float(table[range(len(end)), end].sum()) for table, end in values])
    return sums


def next_log_probabilities(
    owl: OwlForConditionalGeneration, processor: OwlProcessor, rows: Sequence[tuple[list[int], list]], tail: int
) -> list[torch.Tensor]:
    """[tail, V] in float64 for each row of token ids with its pictures: log p of the token after each of its last
    ``tail`` ones. Rows are padded on the right, where a causal model does not look."""
    inputs = processor.collate([Encoded(ids, ids, len(shown)) for ids, shown in rows])
    del inputs["labels"]
    pixels = [image for _, shown in rows for image in shown]
    if pixels:
        inputs["pixel_values"] = torch.stack(pixels)
    hidden = owl.model(**on_device(owl, inputs)).last_hidden_state
    kept = torch.stack([row[len(ids) - tail : len(ids)] for row, (ids, _) in zip(hidden, rows, strict=True)])
    return list(owl.lm_head(kept).double().log_softmax(dim=-1).cpu())


@torch.no_grad()
def stream(
    owl: OwlForConditionalGeneration,
    processor: OwlProcessor,
    conversation: Sequence[dict],
    images: Sequence,
    videos: Sequence[Sequence] = (),
    **options,
) -> Iterator[str]:
    """One conversation's answer in pieces, as it is made."""
    inputs = on_device(owl, prompt_inputs(processor, [conversation], [images], [videos]))
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    config = generation_config(owl, processor, **options)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            owl.generate(**inputs, generation_config=config, streamer=streamer)
        except BaseException as error:  # told to the reader below, who else would wait for ever
            failed.append(error)
            streamer.end()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failed:
        raise failed[0]


def load(folder: str, bits: int | None = None) -> tuple[OwlForConditionalGeneration, OwlProcessor]:
    """A model folder, ready to answer on the GPU if there is one. ``bits`` 8 or 4 quantizes the language model's
    matrices as it is read (bitsandbytes); vision encoder, abstractor and head stay as they are."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict = {"device_map": device}
    if bits is not None:
        if bits not in (4, 8):
            raise ValueError(f"{bits} bits: the language model can be read in 8 or 4")
        if not is_bitsandbytes_available():
            raise ValueError("reading in 8 or 4 bits needs bitsandbytes: pip install 'owl-vlm[quantized]'")
        whole = ["model.vision_model", "model.abstractor", "lm_head"]
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on CPUs it tells of every cast of every layer
        chosen = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        options["quantization_config"] = BitsAndBytesConfig(**chosen, llm_int8_skip_modules=whole)
    owl = OwlForConditionalGeneration.from_pretrained(folder, **options).eval()
    return owl, OwlProcessor.from_pretrained(folder)
