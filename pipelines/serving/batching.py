"""The built-in engine: transformers' continuous batching, made to see pictures (virtual.py), to choose each request's
tokens its own way (sampling.py), and to be quick on a CPU (attention.py).

It sees token ids and pixels only. Requests join and leave the running batch at any token.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.generation.continuous_batching.utils import stream_context
from transformers.modeling_outputs import CausalLMOutput

from owl_model import OwlForConditionalGeneration, OwlProcessor
from owl_model.adaptive import sort_rows
from owl_model.looking import looked
from pipelines.serving import attention
from pipelines.serving.adapters import Adapters
from pipelines.serving.attention import Paged, Slots
from pipelines.serving.compiled import Compiled
from pipelines.serving.engine import Ask, Busy, Died, Picture, Step, Unfit
from pipelines.serving.graphs import Graphs
from pipelines.serving.options import Room, longest_of
from pipelines.serving.sampling import Choice, grammar_of
from pipelines.serving.shared import Shared, There
from pipelines.serving.virtual import PictureIds
from pipelines.settings import OwlError

log = logging.getLogger("owl.serving")


class Decoder(PreTrainedModel, GenerationMixin):
    """An Owl's language model by itself: token ids in, logits out, with ids above the vocabulary for pictures."""

    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, owl: OwlForConditionalGeneration, pictures: PictureIds):
        super().__init__(owl.config.text_config)
        self.model, self.lm_head, self.pictures = owl.model.language_model, owl.lm_head, pictures
        self.adaptive = owl.config.modality_adaptive
        self.in_batch: Callable[[], Sequence[FutureRequestState]] = tuple
        """The requests of the step that is being computed, in the order of its rows."""
        self.slots: Slots | None = None
        """For attention.py."""
        self.compiled: Compiled | None = None
        """For steps without adapters, and without pictures where these have weights of their own, on a CPU."""
        self.graphs: Graphs | None = None
        """For steps of next tokens without adapters, on a GPU."""
        self.adapters: Adapters | None = None
        self.adapter_of: dict[str, str] = {}
        """Request → its adapter."""

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values; see attention.py."""
        return torch.float32 if self.device.type == "cpu" else super().dtype

    def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor | int = 0, **kwargs) -> CausalLMOutput:
        """[1, L] → logits [1, L', V]"""
        if input_ids.is_cuda:  # what a step is made of was copied on the stream of the thread
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        requests = self.in_batch()
        plan = self.slots.plan(requests) if self.slots is not None else None
        if plan is not None and self.graphs is not None:
            cache = kwargs["cache"]
            if not self.adapter_of and self.graphs.fit(plan, requests, cache):
                return CausalLMOutput(logits=self.graphs(kwargs["write_index"][0], plan, requests, cache))
            self.graphs.settle()
        ids = self.pictures.plain(input_ids)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if plan is not None and self.slots is not None:
            plain = not (self.adapter_of or (self.adaptive and (ids >= self.pictures.first).any()))
            if self.compiled is not None and plain:
                step = Paged(kwargs["cache"], plan, self.slots, kwargs["read_index"], kwargs["write_index"])
                kept = torch.arange(ids.shape[1], device=ids.device)[keep]
                logits = self.compiled(self.pictures(ids), kwargs["position_ids"], kept, step)
                return CausalLMOutput(logits=logits)
            kwargs |= {"plan": plan, "held": self.slots}
        if self.adaptive:
            kwargs["rows"] = sort_rows(ids >= self.pictures.first)
        adapters = self.adapters if self.adapter_of else None
        with adapters.used(self.rows(requests), kwargs.get("rows")) if adapters else nullcontext():
            hidden = self.model(inputs_embeds=self.pictures(ids), **kwargs).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden[:, keep]))

    def rows(self, requests: Sequence[FutureRequestState]) -> list[tuple[str, slice]]:
        """Which rows of a step are of requests with an adapter."""
        found, first = [], 0
        for request in requests:
            end = first + request.query_length
            if adapter := self.adapter_of.get(request.state.request_id):
                found.append((adapter, slice(first, end)))
            first = end
        return found


Result = TypeVar("Result")


def aside(work: Callable[..., Result], *given: Any) -> Result:
    """In a thread that ends with it. A thread's OpenMP team lives as long as the thread, and a second team beside the
    engine's takes up to half its speed: with more threads than cores they no longer wait for each other awake."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work, *given).result()


async def apart(work: Callable[..., Result], *given: Any) -> Result:
    """Likewise, while the event loop goes on."""
    pool = ThreadPoolExecutor(1)
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *given)
    finally:
        pool.shutdown(wait=False)


def grammars_of(processor: OwlProcessor, owl: OwlForConditionalGeneration) -> Any:
    """llguidance's tokenizer of a model's, or None where its kind of tokenizer is unknown to it."""
    from llguidance.hf import from_tokenizer

    try:
        return from_tokenizer(processor.tokenizer, n_vocab=owl.config.text_config.vocab_size)
    except Exception as error:
        log.warning("response_format is refused, since llguidance does not know this kind of tokenizer: %s", error)
        return None


class Batching:
    """The engine. Made and used on one event loop; it computes in a thread of its own."""

    def __init__(
        self,
        owl: OwlForConditionalGeneration,
        end: int,
        room: Room,
        grammars: Any = None,
        shared: Shared | There | None = None,
    ):
        """``end`` is the token that closes an answer, ``grammars`` llguidance's tokenizer, ``shared`` where pictures'
        embeddings are shared with other engines. Raises OwlError for a model with attention of its own."""
        text = owl.config.text_config
        if not getattr(owl.model.language_model, "_supports_attention_backend", False):
            raise OwlError(f"{text.model_type} brings its own attention, which cannot be batched continuously")
        if "page_size" not in ContinuousBatchingConfig.__dataclass_fields__:
            raise OwlError(f"the built-in engine needs transformers 5.19 or newer; this is {transformers.__version__}")
        self.owl, self.end, self.room, self.shared = owl.eval(), end, room, shared
        self.media = (owl.config.image_token_id, owl.config.video_token_id)
        self.pictures = aside(PictureIds, owl.get_input_embeddings(), owl.config.visual_tokens, room.pictures)
        self.decoder = Decoder(owl, self.pictures).eval()
        self.decoder.in_batch = self.in_batch
        settings = ContinuousBatchingConfig(
            page_size=room.page,
            num_blocks=room.tokens // room.page,
            max_batch_tokens=room.batch_tokens,
            max_requests_per_batch=room.requests,
            use_async_batching=False,
            use_cuda_graph=False,  # graphs.py captures
        )
        plain = GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=0)
        self.decoder.set_attn_implementation("sdpa")
        self.manager = self.decoder.init_continuous_batching(
            generation_config=plain, continuous_batching_config=settings
        )
        self.decoder.set_attn_implementation(attention.register())
        self.decoder.slots = attention.Slots(room.requests, room.tokens, self.decoder.device)
        words = [token for token in self.media if token < text.vocab_size]  # some models have none there
        parts = self.decoder.model, self.decoder.lm_head
        if self.decoder.device.type == "cuda":
            slots = self.decoder.slots
            self.decoder.graphs = Graphs(*parts, self.pictures.words, slots, room.compile, words)
        elif room.compile:
            self.decoder.compiled = Compiled(*parts)
            aside(self.decoder.compiled.compile, text, owl.get_input_embeddings().weight.dtype)
        self.adapters = self.decoder.adapters = Adapters(owl)
        self.choice = Choice(words, end, grammars)
        steps = self.manager.logit_processor
        steps.logits_processor.append(self.choice)
        steps.tensors_required += 1
        steps.do_processing = True
        steps._retrieve_processors_kwargs()
        self.cached: dict[str, int] = {}
        """Request → tokens of its prompt that were in the cache."""
        self.asked = 0
        """Requests that are here."""
        self.counts = {"prompt_tokens": 0, "cached_tokens": 0}
        self.endings: set[asyncio.Task] = set()
        """Of requests that are being ended; the event loop itself does not hold its tasks."""
        self.manager.start()
        if self.decoder.graphs is not None:
            aside(self.warm)

    def warm(self) -> None:
        """Captures the graphs of the first steps, so that no request waits for it."""
        while self.manager.batch_processor is None:
            if not self.manager.is_running():
                raise RuntimeError("the engine did not start")
            time.sleep(0.01)
        processor = self.manager.batch_processor
        assert self.decoder.graphs is not None
        with stream_context(processor.inputs_and_outputs.compute_stream):
            self.decoder.graphs.warm(processor.cache)

    async def submit(self, ask: Ask) -> AsyncGenerator[Step, None]:
        """As of engine.Engine."""
        self.refuse_unfit(ask)
        if self.asked >= self.room.requests + self.room.queue:
            raise Busy(f"{self.asked} requests are being answered or wait; no more are taken")
        self.asked += 1
        takes: list[asyncio.Task[list[int]]] = []
        over, submitted = False, False
        try:
            if ask.adapter:
                self.decoder.adapter_of[ask.name] = ask.adapter
                await apart(self.adapters.load, ask.adapter, set(self.decoder.adapter_of.values()))
            for picture in ask.pictures:
                takes.append(asyncio.create_task(self.take(picture)))
                await asyncio.shield(takes[-1])
            arrived: asyncio.Queue = asyncio.Queue()
            self.manager.register_result_handler(ask.name, arrived.put_nowait)
            submitted = True
            self.manager.add_request(
                self.with_pictures(ask, [take.result() for take in takes]),
                request_id=ask.name,
                max_new_tokens=ask.longest,
                streaming=True,
                eos_token_id=-1 if ask.sampling.ignore_end else self.end,
                sampling=ask.sampling,
            )
            told = 0
            while not over:
                output = await arrived.get()
                while not arrived.empty():  # all that came while nobody read is one step
                    output = arrived.get_nowait()
                if output.error:
                    raise Died(output.error)
                over = output.is_finished()
                tokens = output.generated_tokens[told:]
                facts = self.choice.told.get(ask.name, [])[told : told + len(tokens)]
                finish = None
                if over:
                    finish = "stop" if tokens and tokens[-1] == self.end else "length"
                cached = self.cached.get(ask.name, 0) if not told else 0
                told += len(tokens)
                if tokens or over:
                    yield Step(tokens, facts, finish, cached)
        finally:
            ending = asyncio.create_task(self.ended(ask, takes, running=submitted and not over))
            self.endings.add(ending)
            ending.add_done_callback(self.endings.discard)
            await asyncio.shield(ending)

    async def ended(self, ask: Ask, takes: list[asyncio.Task[list[int]]], running: bool) -> None:
        """Gives back all that a request held. Not to be cancelled: a picture's room would be lost, or be given away
        while a step still reads it."""
        if running:
            await self.cancel(ask.name)
        self.choice.forget(ask.name)
        self.decoder.adapter_of.pop(ask.name, None)
        if self.decoder.slots is not None:
            self.decoder.slots.leave(ask.name)
        if ask.name in self.cached:
            self.counts["prompt_tokens"] += len(ask.ids)
            self.counts["cached_tokens"] += self.cached.pop(ask.name)
        for taken in await asyncio.gather(*takes, return_exceptions=True):
            if isinstance(taken, list):
                self.pictures.let_go(taken)
        self.asked -= 1

    def refuse_unfit(self, ask: Ask) -> None:
        """Raises Unfit for what would never be answered, or would end the engine."""
        words = [token for token in ask.ids if token not in self.media]
        if not ask.ids or not all(0 <= token < self.pictures.first for token in words):
            raise Unfit(f"the prompt must be of token ids from 0 to {self.pictures.first - 1}")
        longest = longest_of(self.owl.config, self.room)
        if len(ask.ids) + ask.longest > longest:
            raise Unfit(f"the prompt has {len(ask.ids)} tokens, of {longest} that prompt and answer may have")
        runs = len(ask.ids) - len(words)
        if runs != len(ask.pictures) * self.pictures.tokens:
            raise Unfit(f"the prompt has {runs} placeholders, for {len(ask.pictures)} pictures")
        if ask.sampling.schema_:
            if self.choice.grammars is None:
                raise Unfit("response_format: this engine has no grammars")
            grammar_of(ask.sampling.schema_)

    async def take(self, picture: Picture) -> list[int]:
        """The picture's ids; its embeddings come from the shelf where another engine made them, or go there."""
        ready = None
        if self.shared and not self.pictures.holds(picture.digest):
            ready = await self.shared.embeddings(picture.digest)
        made: list[torch.Tensor] = []

        def encode() -> torch.Tensor:
            if ready is not None:
                self.pictures.encoded -= 1
                return torch.from_numpy(ready).to(self.owl.device)
            made.append(self.encode(picture))
            return made[0]

        try:
            ids = await apart(self.pictures.take, picture.digest, encode)
        except ValueError as error:
            raise Unfit(str(error)) from None
        if made and self.shared:
            await self.shared.keep_embeddings(picture.digest, made[0].float().cpu().numpy())
        return ids

    async def cancel(self, name: str) -> None:
        """Takes a request out, and waits until no step can still read its pictures: their room may be given away then,
        and keys and values made of another picture's would be kept under these ids."""
        self.manager.cancel_request(name)
        scheduler = self.manager.batch_processor.scheduler if self.manager.batch_processor else None
        away = 0
        while scheduler and away < 2 and self.manager.is_running():  # once may be on its way from the queue to there
            known = name in scheduler.active_requests or name in scheduler.waiting_requests
            away = 0 if known or not self.manager.cancel_queue.empty() else away + 1
            await asyncio.sleep(0.005)
        self.manager.output_router.result_handlers.pop(name, None)

    @torch.no_grad()
    def encode(self, picture: Picture) -> torch.Tensor:
        """[tokens, D]. Raises ValueError where the model cannot read it."""
        pixels = torch.from_numpy(picture.pixels).unsqueeze(0).to(self.owl.device)
        read = self.owl.get_image_features if pixels.ndim == 4 else self.owl.model.get_video_features
        return read(pixels).pooler_output[0]

    def with_pictures(self, ask: Ask, taken: Sequence[list[int]]) -> list[int]:
        """Placeholders replaced by the pictures' own ids, in reading order; the first token salted."""
        coming = iter([token for some in taken for token in some])
        ids = [next(coming) if token in self.media else token for token in ask.ids]
        if ask.salt or ask.adapter:
            ids[0] = self.pictures.salt(f"{ask.salt}\0{ask.adapter}", ids[0])
        return ids

    def in_batch(self) -> Sequence[FutureRequestState]:
        """The requests of the step that is being computed, in the order of its rows."""
        processor = self.manager.batch_processor
        found = processor.inputs_and_outputs.requests_in_batch if processor else []
        for request in found:
            self.cached.setdefault(request.state.request_id, request.state.position_offset - request.query_length)
        return found

    async def looked(self, ask: Ask, answer: list[int]) -> list[np.ndarray]:
        """As of engine.Engine; another pass over prompt and answer, beside the running batch."""
        if not answer or any(picture.pixels.ndim != 3 for picture in ask.pictures):
            raise Unfit("there is an answer about pictures to be looked at")
        pixels = torch.stack([torch.from_numpy(picture.pixels) for picture in ask.pictures])
        name = f"{ask.name} looked"
        if ask.adapter:
            self.decoder.adapter_of[name] = ask.adapter
        try:
            if ask.adapter:
                await apart(self.adapters.load, ask.adapter, set(self.decoder.adapter_of.values()))
            return await apart(self.look, ask, answer, pixels)
        except ValueError as error:
            raise Unfit(str(error)) from None
        finally:
            self.decoder.adapter_of.pop(name, None)

    def look(self, ask: Ask, answer: list[int], pixels: torch.Tensor) -> list[np.ndarray]:
        ids = torch.tensor([*ask.ids, *answer[:-1]], device=self.owl.device)
        split = sort_rows(ids[None] == self.media[0]) if self.owl.config.modality_adaptive else None
        rows = [(ask.adapter, slice(0, len(ids)))] if ask.adapter else []
        with self.adapters.used(rows, split):
            return [grid.numpy() for grid in looked(self.owl, ask.ids, answer, pixels)]

    async def stats(self) -> dict[str, float]:
        """As of engine.Engine."""
        processor = self.manager.batch_processor
        scheduler = processor.scheduler if processor else None
        running = len(scheduler.active_requests) if scheduler else 0
        cache = processor.cache if processor else None
        share = 1 - cache.compute_free_capacity() if cache else 0.0
        return {
            "running": running,
            "waiting": self.asked - running,
            "cache": share,
            "pictures_encoded": self.pictures.encoded,
            "pictures_known": self.pictures.known,
            **self.counts,
        }

    async def check(self) -> None:
        if not self.manager.is_running():
            raise RuntimeError("the engine has stopped")

    async def drain(self) -> None:
        while self.asked:
            await asyncio.sleep(0.05)

    def stop(self) -> None:
        self.manager.stop(block=True)
