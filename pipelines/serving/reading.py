"""A request's way in: from OpenAI's words and pictures to token ids and pixels, paid for from its key's budget.

Whatever is refused is refused here, by name, before an engine is asked.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import dataclass, field
from typing import Any

from pipelines.records import parts
from pipelines.serving.api import (
    Asking,
    ChatRequest,
    CompletionRequest,
    Refusal,
    Shape,
    Tokenized,
    TokenizeMessages,
    TokenizeText,
)
from pipelines.serving.engine import Ask, Picture, Sampling
from pipelines.serving.keys import UNITS, Key
from pipelines.serving.media import Pictures, plain
from pipelines.serving.meters import Meters
from pipelines.serving.models import Models
from pipelines.serving.options import Serving
from pipelines.serving.shared import Shared, There


@dataclass
class Work:
    """One request while it is answered."""

    request: Asking
    key: Key
    shape: Shape
    asks: list[Ask]
    arrived: float
    charged: dict[str, int]
    answers: list[list[int]] = field(default_factory=list)
    """The tokens of each choice, as they come."""
    cached: int = 0
    first: float | None = None
    """When the first token was there."""

    @property
    def model(self) -> str:
        return self.request.model

    @property
    def prompt(self) -> int:
        """Tokens of all prompts; choices of one share it."""
        return sum(len(ask.ids) for ask in self.asks[:: self.request.n])


class Reader:
    """Makes requests ready for an engine."""

    def __init__(self, models: Models, settings: Serving, shared: Shared | There, meters: Meters):
        self.models, self.settings, self.shared, self.meters = models, settings, shared, meters
        self.processor = models.processor
        self.pictures = Pictures(settings.media, self.processor, shared)

    async def chat(self, request: ChatRequest, key: Key, name: str) -> Work:
        """A chat request made ready. Raises Refusal."""
        arrived = time.monotonic()
        self.models.refuse_unknown(request.model)
        pictures = await self.pictures.of(request.messages, key)
        if pictures:
            self.meters.observe("picture_seconds", time.monotonic() - arrived, model_name=request.model, key=key.name)
        ids = self.prompt_of(request.messages, len(pictures))
        held = request.response_format and request.response_format.held_to
        return await self.work(
            request,
            key,
            Shape(request.model, chat=True),
            [(ids, pictures)],
            name,
            arrived,
            schema_=json.dumps(held) if held is not None else "",
            logprobs=request.told,
        )

    async def complete(self, request: CompletionRequest, key: Key, name: str) -> Work:
        """Likewise of plain completions."""
        arrived = time.monotonic()
        self.models.refuse_unknown(request.model)
        prompts = [self.ids_of(p) if isinstance(p, str) else p for p in request.prompts]
        if any(token in (self.processor.image_token_id, self.processor.video_token_id) for p in prompts for token in p):
            raise Refusal(400, "prompt: pictures can be shown in chat completions only", "prompt")
        shape = Shape(request.model, chat=False)
        return await self.work(
            request, key, shape, [(p, []) for p in prompts], name, arrived, logprobs=request.logprobs
        )

    async def work(
        self,
        request: ChatRequest | CompletionRequest,
        key: Key,
        shape: Shape,
        prompts: list[tuple[list[int], list[Picture]]],
        name: str,
        arrived: float,
        **sampling: Any,
    ) -> Work:
        room = self.models.longest - max(len(ids) for ids, _ in prompts)
        if room < 1:
            raise Refusal(
                400,
                f"the prompt takes {self.models.longest - room} tokens, more than the model can hold with an answer; "
                f"prompt and answer may have {self.models.longest} together",
                "messages" if shape.chat else "prompt",
                "context_length_exceeded",
            )
        longest = min(request.longest or self.settings.longest, room)
        seed = random.getrandbits(31) if request.seed is None else request.seed
        adapter = self.models.adapter(request.model)
        asks = [
            Ask(
                f"{name}-{number * request.n + choice}" if request.n * len(prompts) > 1 else name,
                ids,
                pictures,
                Sampling(
                    temperature=request.temperature,
                    top_p=request.top_p,
                    top_k=request.top_k,
                    seed=seed + choice,
                    presence_penalty=request.presence_penalty,
                    frequency_penalty=request.frequency_penalty,
                    ignore_end=request.ignore_eos,
                    **sampling,
                ),
                longest,
                f"{key.name}\0{request.cache_salt or ''}",
                adapter,
            )
            for number, (ids, pictures) in enumerate(prompts)
            for choice in range(request.n)
        ]
        shown = sum(len(pictures) for _, pictures in prompts)
        asked = {
            "requests": 1,
            "tokens": sum(len(ids) for ids, _ in prompts) + len(asks) * longest,
            "pictures": shown,
        }
        await self.charge(key, asked)
        self.meters.count("pictures_total", shown, model_name=request.model, key=key.name)
        return Work(request, key, shape, asks, arrived, asked, [[] for _ in asks])

    async def charge(self, key: Key, amounts: dict[str, int]) -> None:
        """Raises Refusal where the key has spent too much."""
        if all(getattr(key, f"{unit}_a_minute") is None for unit in UNITS):
            return
        short = await self.shared.spend(key, amounts)
        if short is None:
            return
        unit, wait = short
        limit = getattr(key, f"{unit}_a_minute")
        self.meters.count("admission_rejections_total", key=key.name, reason=f"{unit}_budget")
        if math.isinf(wait):
            told = f"the request asks for {amounts[unit]} {unit}; this key may spend {limit} a minute"
            raise Refusal(429, told, code="insufficient_quota")
        told = f"this key may spend {limit} {unit} a minute; try again in {math.ceil(wait)} s"
        raise Refusal(429, told, code="rate_limit_exceeded", wait=math.ceil(wait))

    def prompt_of(self, messages: list, pictures: int) -> list[int]:
        """A conversation's token ids. Raises Refusal."""
        spoken = plain(messages)
        self.refuse_longer(sum(len(part.get("text", "")) for message in spoken for part in parts(message["content"])))
        try:
            encoded = self.processor.encode(spoken, prompt=True)
        except ValueError as problem:
            raise Refusal(400, f"messages: {problem}", "messages") from None
        if encoded.images + encoded.videos != pictures:
            raise Refusal(400, "messages: a text holds a picture's placeholder", "messages")
        return encoded.ids

    def refuse_longer(self, characters: int) -> None:
        """Raises Refusal for a text that is too long whatever its tokens are, before it is cut into them."""
        if characters > self.models.longest * self.models.longest_word:
            raise Refusal(
                400,
                f"the text has {characters} characters, more than the model can hold in {self.models.longest} tokens",
                code="context_length_exceeded",
            )

    def ids_of(self, text: str) -> list[int]:
        self.refuse_longer(len(text))
        return self.processor.tokenizer(text)["input_ids"]

    async def tokenize(self, request: TokenizeText | TokenizeMessages, key: Key) -> Tokenized:
        """Raises Refusal."""
        self.models.refuse_unknown(request.model)
        if isinstance(request, TokenizeText):
            ids = self.ids_of(request.prompt)
        else:
            ids = self.prompt_of(request.messages, len(await self.pictures.of(request.messages, key)))
        return Tokenized(count=len(ids), max_model_len=self.models.longest, tokens=ids)
