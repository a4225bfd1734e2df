"""vLLM behind engine.Engine: the same asks, answered by its AsyncLLM in a process beside this one.

Prompts arrive with their pictures placed and prepared: vLLM's own reading of text, pictures and addresses is not used,
nor its HTTP server.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import mm_input, tokens_input
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerBase

from owl_model import OwlConfig
from pipelines.serving.engine import Ask, Busy, Died, Step, Unfit
from pipelines.serving.models import digest
from pipelines.serving.options import Serving, longest_of
from pipelines.serving.sampling import grammar_of

log = logging.getLogger("owl.serving")


class Stats(StatLoggerBase):
    """What vLLM says of itself, as engine.Engine.stats calls it."""

    def __init__(self, vllm_config: Any, engine_index: int = 0):
        self.now: dict[str, float] = {"running": 0, "waiting": 0, "cache": 0.0, "prompt_tokens": 0, "cached_tokens": 0}

    def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0):
        if scheduler_stats is None:
            return
        prefix = scheduler_stats.prefix_cache_stats
        self.now["running"] = scheduler_stats.num_running_reqs
        self.now["waiting"] = scheduler_stats.num_waiting_reqs
        self.now["cache"] = scheduler_stats.kv_cache_usage
        self.now["prompt_tokens"] += prefix.queries
        self.now["cached_tokens"] += prefix.hits

    def log_engine_initialized(self) -> None: ...


class Vllm:
    """The engine. Made and used on one event loop."""

    def __init__(self, folder: str, end: int, settings: Serving):
        """``end`` is the token that closes an answer. Raises what vLLM raises where it cannot serve the folder."""
        self.config, self.end, self.room = OwlConfig.from_pretrained(folder), end, settings.room
        self.forbidden = [
            token
            for token in (self.config.image_token_id, self.config.video_token_id)
            if token < self.config.text_config.vocab_size
        ]
        self.longest = longest_of(self.config, self.room)
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        text = self.config.text_config
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        args = AsyncEngineArgs(
            model=folder,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=self.longest,
            max_num_seqs=self.room.requests,
            max_num_batched_tokens=max(self.room.batch_tokens, self.config.visual_tokens),
            kv_cache_memory_bytes=2 * text.num_hidden_layers * width * dtype.itemsize * self.room.tokens,
            enable_prefix_caching=True,
            limit_mm_per_prompt={"image": settings.media.max_pictures},
            structured_outputs_config={"backend": "guidance"},
            enforce_eager=self.config.modality_adaptive,
            enable_lora=bool(settings.adapters),
            max_loras=8 if settings.adapters else 1,
            max_lora_rank=64,
            mm_processor_cache_gb=0,
        )
        self.told: list[Stats] = []
        self.llm = AsyncLLM.from_engine_args(args, stat_loggers=[self.stats_of])
        self.llm.renderer.validate_token_ids = checked_already
        self.adapters: dict[str, int] = {}
        self.asked = 0

    def stats_of(self, vllm_config: Any, engine_index: int = 0) -> Stats:
        self.told.append(Stats(vllm_config, engine_index))
        return self.told[-1]

    async def submit(self, ask: Ask) -> AsyncGenerator[Step, None]:
        """As of engine.Engine."""
        prompt, chosen = self.prompt(ask), self.sampling(ask)
        if self.asked >= self.room.requests + self.room.queue:
            raise Busy(f"{self.asked} requests are being answered or wait; no more are taken")
        self.asked += 1
        outputs: AsyncGenerator[Any, None] | None = None
        try:
            adapter = await asyncio.to_thread(self.adapter, ask.adapter) if ask.adapter else None
            outputs = self.llm.generate(prompt, chosen, ask.name, lora_request=adapter)
            first = True
            async for output in outputs:
                made = output.outputs[0]
                tokens = list(made.token_ids)
                facts = []
                if (count := ask.sampling.logprobs) is not None:
                    facts = [fact_of(token, at, count) for token, at in zip(tokens, made.logprobs, strict=True)]
                finish = {"stop": "stop", "length": "length"}.get(made.finish_reason or "")
                if output.finished and finish is None:
                    raise Died(f"vLLM ended the answer: {made.finish_reason}")
                if tokens or finish:
                    yield Step(tokens, facts, finish, (output.num_cached_tokens or 0) if first else 0)
                    first = False
        except (EngineDeadError, EngineGenerateError) as problem:
            raise Died(type(problem).__name__) from None
        except VLLMClientError as problem:
            raise Unfit(str(problem)) from None
        finally:
            if outputs is not None:
                await outputs.aclose()
            self.asked -= 1

    def prompt(self, ask: Ask) -> Any:
        """An ask's prompt as vLLM takes what has been prepared. Raises Unfit."""
        if any(picture.pixels.ndim != 3 for picture in ask.pictures):
            raise Unfit("this engine reads pictures, and no videos")
        if len(ask.ids) + ask.longest > self.longest:
            raise Unfit(f"the prompt has {len(ask.ids)} tokens, of {self.longest} that prompt and answer may have")
        image = self.config.image_token_id
        starts = [place for place, token in enumerate(ask.ids) if token == image][:: self.config.visual_tokens]
        if ask.ids.count(image) != len(ask.pictures) * self.config.visual_tokens:
            raise Unfit(f"the prompt has {ask.ids.count(image)} placeholders, for {len(ask.pictures)} pictures")
        words = [token for token in ask.ids if token != image]
        if not ask.ids or not all(0 <= token < self.config.text_config.vocab_size for token in words):
            raise Unfit("the prompt must be of the model's token ids")
        if not ask.pictures:
            return tokens_input(ask.ids, cache_salt=ask.salt or None)
        items = [
            MultiModalKwargsItem(
                {"pixel_values": MultiModalFieldElem(torch.from_numpy(picture.pixels), MultiModalBatchedField())}
            )
            for picture in ask.pictures
        ]
        return mm_input(
            ask.ids,
            MultiModalKwargsItems({"image": items}),
            {"image": [picture.digest for picture in ask.pictures]},
            {"image": [PlaceholderRange(start, self.config.visual_tokens) for start in starts]},
            cache_salt=ask.salt or None,
        )

    def sampling(self, ask: Ask) -> SamplingParams:
        """Raises Unfit for a JSON schema that cannot be held to."""
        wanted = ask.sampling
        if wanted.schema_:
            grammar_of(wanted.schema_)
        return SamplingParams(
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            top_k=wanted.top_k,
            seed=wanted.seed,
            presence_penalty=wanted.presence_penalty,
            frequency_penalty=wanted.frequency_penalty,
            logprobs=wanted.logprobs,
            max_tokens=ask.longest,
            ignore_eos=True,  # the token that closes an answer is the template's, which need not be the model's eos
            stop_token_ids=[] if wanted.ignore_end else [self.end],
            logit_bias=dict.fromkeys(self.forbidden, -100.0) or None,
            structured_outputs=StructuredOutputsParams(json=wanted.schema_) if wanted.schema_ else None,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def adapter(self, name: str) -> LoRARequest:
        """``name`` is FOLDER@DIGEST. Raises Unfit where the folder holds something else now."""
        folder, _, wanted = name.rpartition("@")
        if digest(folder) != wanted:
            raise Unfit("the adapter has changed; ask again")
        return LoRARequest(name, self.adapters.setdefault(name, len(self.adapters) + 1), folder)

    async def looked(self, ask: Ask, answer: list[int]) -> list[np.ndarray]:
        raise Unfit("vLLM does not tell where an answer looked")

    async def stats(self) -> dict[str, float]:
        """As of engine.Engine."""
        return dict(self.told[0].now) if self.told else {}

    async def check(self) -> None:
        try:
            await self.llm.check_health()
        except EngineDeadError:
            raise RuntimeError("vLLM's process has ended") from None

    async def drain(self) -> None:
        while self.asked:
            await asyncio.sleep(0.05)

    def stop(self) -> None:
        self.llm.shutdown()


def checked_already(token_ids: Sequence[int], *, parameter: str | None = None) -> None:
    """In the place of vLLM's check, which knows of no placeholders above the vocabulary; ours is in Vllm.prompt."""


def fact_of(token: int, told: dict[int, Any], count: int) -> dict[str, Any]:
    """A token's logprob and those of the ``count`` likeliest in its place, as engine.Step tells them."""
    likeliest = sorted((one.rank, other) for other, one in told.items() if one.rank <= count)
    return {"logprob": told[token].logprob, "top": [(other, told[other].logprob) for _, other in likeliest]}
