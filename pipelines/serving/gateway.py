"""A request's way back: from an engine's tokens to OpenAI's words, through whatever happens to engines and clients.

The way in is reading.py. The engine sees neither text nor HTTP.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import Any, NamedTuple, TypeVar

from pipelines.serving.api import ChatRequest, Refusal, usage_of
from pipelines.serving.engine import Busy, Died, Engine, Unfit
from pipelines.serving.keys import Key
from pipelines.serving.meters import Meters
from pipelines.serving.models import Models
from pipelines.serving.options import Serving
from pipelines.serving.reading import Reader, Work
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
        self.reader = Reader(models, settings, shared, meters)

    # --- while it answers --------------------------------------------------------------------------------------------

    async def spoken(self, work: Work, index: int) -> AsyncIterator[Piece]:
        """One choice's text as it comes. An engine that goes away before it said anything is replaced by another.
        Raises Refusal."""
        ask, tries = work.asks[index], 1
        writer = Writer(self.models.processor.tokenizer, work.request.stops, ask.sampling.logprobs is not None)
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
            tokenizer = self.models.processor.tokenizer
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
                found["looked"] = [[[round(float(value), 5) for value in row] for row in grid] for grid in maps]
            except (Unfit, Died) as problem:  # the answer itself is there
                found |= {"looked": None, "not_looked": str(problem)}
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
        """Prometheus' page of this gateway, and of an engine that runs beside it."""
        self.meters.tell(await self.engine.stats())
        return self.meters.page()

    async def start(self) -> None:
        await self.reader.pictures.decoders.start()

    async def close(self) -> None:
        await self.reader.pictures.close()


def event(value: dict) -> str:
    return f"data: {json.dumps(value)}\n\n"


Answer = TypeVar("Answer")


async def unless_left(answer: Awaitable[Answer], left: Awaitable[None]) -> Answer | None:
    """An answer, or None where its reader leaves first: then nothing goes on with it."""
    waiting, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(left)
    try:
        await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
        return waiting.result() if waiting.done() else None
    finally:
        waiting.cancel()
        leaving.cancel()
        await asyncio.gather(waiting, leaving, return_exceptions=True)
