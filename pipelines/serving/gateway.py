"""A request's way: from OpenAI's words to token ids and pixels, and from an engine's tokens back to OpenAI's words.

The engine sees neither text nor HTTP. Whatever is refused is refused here, by name, in OpenAI's shape.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
    usage_of,
)
from pipelines.serving.engine import Ask, Busy, Died, Engine, Picture, Sampling, Unfit
from pipelines.serving.keys import UNITS, Key
from pipelines.serving.media import Pictures, plain
from pipelines.serving.meters import Meters
from pipelines.serving.models import Models
from pipelines.serving.options import Serving
from pipelines.serving.shared import Shared, There
from pipelines.serving.writing import Writer

log = logging.getLogger("owl.serving")
TRIES = 3
"""Engines that an answer is asked of, one after another, as long as none of it has been told."""


class Piece(NamedTuple):
    """Some of an answer's text; the last has a finish."""

    choice: int
    text: str
    told: list[dict] | None
    finish: str | None


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


class Gateway:
    """What an endpoint's routes do. ``keys`` is None where none are asked for."""

    def __init__(
        self,
        models: Models,
        settings: Serving,
        engine: Engine,
        shared: Shared | There,
        keys: dict[str, Key] | None,
        meters: Meters,
    ):
        self.models, self.settings, self.engine, self.shared = models, settings, engine, shared
        self.keys, self.meters = keys, meters
        self.processor = models.processor
        self.pictures = Pictures(settings.media, self.processor, shared)

    # --- before an engine is asked -----------------------------------------------------------------------------------

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

    # --- while it answers --------------------------------------------------------------------------------------------

    async def spoken(self, work: Work, index: int) -> AsyncIterator[Piece]:
        """One choice's text as it comes. An engine that goes away before it said anything is replaced by another.
        Raises Refusal."""
        ask, tries = work.asks[index], 1
        writer = Writer(self.processor.tokenizer, work.request.stops, ask.sampling.logprobs is not None)
        labels = {"model_name": work.model, "key": work.key.name}
        last: float | None = None
        while True:
            steps = self.engine.submit(ask)
            try:
                async for step in steps:
                    now = time.monotonic()
                    if last is None:
                        self.meters.observe("time_to_first_token_seconds", now - work.arrived, **labels)
                        work.first = work.first or now
                        work.cached += step.cached
                    else:
                        self.meters.observe("inter_token_latency_seconds", now - last, **labels)
                    last = now
                    work.answers[index] += step.tokens
                    tokens, told = step.tokens, step.told
                    if step.finish == "stop" and tokens:  # the token that closes an answer is not part of it
                        tokens, told = tokens[:-1], told[:-1]
                    written = writer.write(tokens, told)
                    if written.stopped:
                        yield Piece(index, written.text, written.told, "stop")
                        return
                    if step.finish:
                        yield Piece(index, written.text + writer.rest(), written.told, step.finish)
                        return
                    if written.text or written.told:
                        yield Piece(index, written.text, written.told, None)
                raise Died("the answer ended without an end")
            except Busy as problem:
                self.meters.count("admission_rejections_total", key=work.key.name, reason="queue")
                raise Refusal(503, str(problem), code="overloaded", wait=1) from None
            except Unfit as problem:
                raise Refusal(400, str(problem)) from None
            except Died:
                if last is not None or tries >= TRIES:
                    log.warning("%s: its engine went away", ask.name)
                    raise Refusal(
                        503, "the engine that answered went away; ask again", code="engine_died", wait=1
                    ) from None
                self.meters.count("request_retries_total", **labels)
                tries += 1
                await asyncio.sleep(0.2 * tries)
            finally:
                await steps.aclose()

    async def pieces(self, work: Work) -> AsyncGenerator[Piece, None]:
        """All choices' pieces as they come; closing it cancels them. Raises Refusal, also when time is up."""
        arrived: asyncio.Queue[Piece | Refusal | None] = asyncio.Queue()

        async def tell(index: int) -> None:
            try:
                async for piece in self.spoken(work, index):
                    arrived.put_nowait(piece)
                arrived.put_nowait(None)
            except Refusal as problem:
                arrived.put_nowait(problem)
            except Exception:
                log.exception("%s failed", work.asks[index].name)
                arrived.put_nowait(Refusal(500, "the answer failed; the log has the reason under the request's id"))

        late = Refusal(504, f"no whole answer within {self.settings.seconds:g} s", code="deadline_exceeded")
        end = work.arrived - time.monotonic() + self.settings.seconds
        timer = asyncio.get_running_loop().call_later(end, arrived.put_nowait, late)
        tasks = [asyncio.create_task(tell(index)) for index in range(len(work.asks))]
        self.meters.add("num_requests_in_flight", 1)
        open_ = len(tasks)
        try:
            while open_:
                piece = await arrived.get()
                if isinstance(piece, Refusal):
                    raise piece
                if piece is None:
                    open_ -= 1
                    continue
                if piece.finish:
                    labels = {"model_name": work.model, "key": work.key.name}
                    self.meters.count("request_success_total", finished_reason=piece.finish, **labels)
                yield piece
        finally:
            timer.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.meters.add("num_requests_in_flight", -1)
            await self.settle(work)

    async def settle(self, work: Work) -> None:
        """After the last piece, whatever it was: counts, and gives back what was charged and not spent."""
        now, labels = time.monotonic(), {"model_name": work.model, "key": work.key.name}
        made = sum(len(answer) for answer in work.answers)
        self.meters.count("prompt_tokens_total", work.prompt, **labels)
        self.meters.count("prompt_tokens_cached_total", work.cached, **labels)
        self.meters.count("generation_tokens_total", made, **labels)
        self.meters.observe("request_prompt_tokens", work.prompt, **labels)
        self.meters.observe("request_generation_tokens", made, **labels)
        self.meters.observe("e2e_request_latency_seconds", now - work.arrived, **labels)
        longest = max((len(answer) for answer in work.answers), default=0)
        if work.first is not None and longest > 1:
            each = (now - work.first) / (longest - 1)
            self.meters.observe("request_time_per_output_token_seconds", each, **labels)
        unused = work.charged["tokens"] - work.prompt - made
        if work.key.tokens_a_minute is not None and unused > 0:
            await self.shared.spend(work.key, {"tokens": -unused})
        if self.settings.log_content:
            tokenizer = self.processor.tokenizer
            answers = [tokenizer.decode(answer, skip_special_tokens=True) for answer in work.answers]
            log.info("%s: %r → %r", work.asks[0].name, tokenizer.decode(work.asks[0].ids), answers)

    async def more(self, work: Work) -> dict[str, Any]:
        """What was asked for beyond OpenAI's fields."""
        found: dict[str, Any] = {}
        if work.request.receipt:
            found["receipt"] = await asyncio.to_thread(self.models.receipt, work.request.model, work.asks, work.answers)
        if isinstance(work.request, ChatRequest) and work.request.looked and work.asks[0].pictures:
            try:
                maps = await self.engine.looked(work.asks[0], work.answers[0])
            except Unfit as problem:
                raise Refusal(400, f"looked: {problem}", "looked") from None
            found["looked"] = [[[round(float(value), 5) for value in row] for row in grid] for grid in maps]
        return {"owl": found} if found else {}

    # --- what goes back ----------------------------------------------------------------------------------------------

    async def whole(self, work: Work) -> dict[str, Any]:
        """The answer at once. Raises Refusal."""
        texts, told = [""] * len(work.asks), [list[dict]() for _ in work.asks]
        finish: list[str | None] = [None] * len(work.asks)
        async for piece in self.pieces(work):
            texts[piece.choice] += piece.text
            told[piece.choice] += piece.told or []
            finish[piece.choice] = piece.finish
        wanted = work.asks[0].sampling.logprobs is not None
        choices = [
            work.shape.choice(index, texts[index], finish[index], told[index] if wanted else None)
            for index in range(len(work.asks))
        ]
        return work.shape.whole(choices, self.usage(work), await self.more(work))

    async def events(self, work: Work) -> AsyncGenerator[str, None]:
        """The answer as server-sent events. Raises Refusal before the first; later ones are an event."""
        pieces = self.pieces(work)
        try:
            first = await anext(pieces)
            for index in range(len(work.asks)) if work.shape.chat else ():
                yield event(work.shape.chunk(index, "", None, None, first=True))
            yield self.event_of(work, first)
            try:
                async for piece in pieces:
                    yield self.event_of(work, piece)
                more = await self.more(work)
            except Refusal as problem:
                yield event(problem.body)
                return
            options = work.request.stream_options
            if more or (options and options.include_usage):
                yield event(work.shape.last(self.usage(work), more))
            yield "data: [DONE]\n\n"
        finally:
            await pieces.aclose()

    def event_of(self, work: Work, piece: Piece) -> str:
        if not piece.finish:
            return event(work.shape.chunk(piece.choice, piece.text, None, piece.told))
        said = event(work.shape.chunk(piece.choice, piece.text, None, piece.told)) if piece.text or piece.told else ""
        return said + event(work.shape.chunk(piece.choice, None, piece.finish, None))

    def usage(self, work: Work) -> dict[str, Any]:
        return usage_of(work.prompt, sum(len(answer) for answer in work.answers), work.cached)

    async def ready(self) -> None:
        """Raises Refusal where no engine answers."""
        try:
            await asyncio.wait_for(self.engine.check(), 5)
        except Exception:
            raise Refusal(503, "no engine is ready", code="not_ready", wait=2) from None

    async def metrics(self) -> bytes:
        """Prometheus' page of this gateway, with what an engine told of itself just now."""
        stats = await self.engine.stats()
        for name, of in ENGINE_STATS.items():
            if of in stats:
                self.meters.set(name, stats[of])
        if "pictures_known" in stats:
            self.meters.set("mm_cache_queries", stats["pictures_known"] + stats["pictures_encoded"])
        return self.meters.page()

    async def start(self) -> None:
        await self.pictures.decoders.start()

    async def close(self) -> None:
        await self.pictures.close()


ENGINE_STATS = {
    "num_requests_running": "running",
    "num_requests_waiting": "waiting",
    "kv_cache_usage_perc": "cache",
    "mm_cache_hits": "pictures_known",
    "prefix_cache_hits": "cached_tokens",
    "prefix_cache_queries": "prompt_tokens",
}


def event(value: dict) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def unless_left(answer: Coroutine[Any, Any, dict], left: Coroutine[Any, Any, None]) -> dict | None:
    """An answer, or None where its reader leaves first: then nothing goes on with it."""
    tasks = asyncio.create_task(answer), asyncio.create_task(left)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
