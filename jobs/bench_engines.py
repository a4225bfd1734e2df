"""How fast the built-in engine decodes beside what one could take instead, at one shape and in one run.

Rivals on the same weights: transformers' `generate`, one by one and as a static batch (a perfect one: all prompts of
one length, all answers too), and its continuous batching as it comes. Turns are taken, so that what else the machine
does hits all alike; each in a thread of its own, so that none meets another's OpenMP team.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig

from owl_model import OwlAbstractorConfig, OwlConfig, OwlForConditionalGeneration, OwlVisionConfig
from pipelines.serving.batching import Batching, Decoder
from pipelines.serving.engine import Ask, Sampling
from pipelines.serving.options import Room
from pipelines.serving.virtual import PictureIds

VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8}
VOCABULARY, QUERIES, END = 32_000, 63, 2


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def small_owl(precision: torch.dtype) -> OwlForConditionalGeneration:
    """Random weights: a decoder of 12 × 512 and 64 visual tokens a picture."""
    torch.manual_seed(0)
    config = OwlConfig(
        vision_config=OwlVisionConfig(**VISION, image_size=112, patch_size=14),
        abstractor_config=OwlAbstractorConfig(**VISION, encoder_hidden_size=256, num_queries=QUERIES),
        text_config=LlamaConfig(**TEXT, vocab_size=VOCABULARY, max_position_embeddings=4096),
    )
    return OwlForConditionalGeneration(config).eval().to(precision)


def prompts_of(clients: int, context: int, turn: int) -> list[list[int]]:
    """Others each turn, so that nothing comes from a cache."""
    draw = random.Random(1000 * turn + clients)
    return [[draw.randrange(10, VOCABULARY - 10) for _ in range(context)] for _ in range(clients)]


Told = list[tuple[float, float, int]]
"""For each client its seconds to the first token, those of each later one, and how many tokens it got."""


class BuiltIn:
    def __init__(self, owl: OwlForConditionalGeneration, room: Room):
        self.owl, self.room = owl, room

    def turn(self, prompts: list[list[int]], new: int) -> tuple[float, Told]:
        async def ask(engine: Batching, number: int, ids: list[int]) -> tuple[float, float, int]:
            began, first, made = time.monotonic(), 0.0, 0
            async for step in engine.submit(Ask(f"{number}", ids, [], Sampling(ignore_end=True), new)):
                first = first or time.monotonic()
                made += len(step.tokens)
            return first - began, (time.monotonic() - first) / max(1, made - 1), made

        async def all_of_them() -> tuple[float, Told]:
            engine = Batching(self.owl, END, self.room)
            try:
                await ask(engine, -1, prompts_of(1, 32, 99)[0])
                began = time.monotonic()
                told = await asyncio.gather(*(ask(engine, n, ids) for n, ids in enumerate(prompts)))
                return time.monotonic() - began, list(told)
            finally:
                engine.stop()

        return asyncio.run(all_of_them())


class PlainDecoder(Decoder):
    """With keys and values in the weights' own type, as transformers has them."""

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype


class Stock:
    """transformers' continuous batching as it comes, over the same decoder."""

    def __init__(self, owl: OwlForConditionalGeneration, room: Room):
        self.owl, self.room = owl, room

    def turn(self, prompts: list[list[int]], new: int) -> tuple[float, Told]:
        decoder = PlainDecoder(self.owl, PictureIds(self.owl.get_input_embeddings(), QUERIES + 1, 1)).eval()
        decoder.set_attn_implementation("sdpa")
        plain = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=new)
        settings = ContinuousBatchingConfig(
            page_size=32,
            num_blocks=self.room.tokens // 32,
            max_batch_tokens=self.room.batch_tokens,
            use_async_batching=False,
        )
        manager = decoder.init_continuous_batching(generation_config=plain, continuous_batching_config=settings)
        manager.start()
        try:
            manager.add_request(prompts_of(1, 32, 99)[0], request_id="first", max_new_tokens=4)
            while (result := manager.get_result(timeout=1)) is None:
                pass
            assert not result.error, result.error
            began = time.monotonic()
            for number, ids in enumerate(prompts):
                manager.add_request(ids, request_id=str(number), max_new_tokens=new)
            done = 0
            while done < len(prompts):
                done += manager.get_result(timeout=1) is not None
            return time.monotonic() - began, []
        finally:
            manager.stop(block=True)


class Generate:
    """`generate`, of all prompts at once or of one after another."""

    def __init__(self, owl: OwlForConditionalGeneration, together: bool):
        self.owl, self.together = owl, together

    def turn(self, prompts: list[list[int]], new: int) -> tuple[float, Told]:
        self.owl.set_attn_implementation("sdpa")
        chosen = GenerationConfig(
            do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=new, min_new_tokens=new
        )
        batches = [prompts] if self.together else [[ids] for ids in prompts]
        began = time.monotonic()
        with torch.inference_mode():
            for batch in batches:
                ids = torch.tensor(batch)
                made = self.owl.generate(ids, attention_mask=torch.ones_like(ids), generation_config=chosen)
                assert made.shape[1] == ids.shape[1] + new
        return time.monotonic() - began, []


def measure(precision: str, clients: int, context: int, new: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Tokens a second of each, over prompts and answers together, in the median over turns."""
    owl = small_owl(PRECISIONS[precision])
    room = Room(tokens=2 * clients * (context + new) + 4096, requests=clients, page=16)
    rivals: dict[str, Callable[[list[list[int]], int], tuple[float, Told]]] = {
        "owl": BuiltIn(owl, room).turn,
        "generate, one by one": Generate(owl, together=False).turn,
        "generate, a static batch": Generate(owl, together=True).turn,
        "transformers' continuous batching": Stock(owl, room).turn,
    }
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    told: Told = []
    for turn in range(repeats + 1):
        for name, rival in rivals.items():
            with ThreadPoolExecutor(1) as apart:
                spent, each = apart.submit(rival, prompts_of(clients, context, turn), new).result()
            if turn:  # the first warms up
                seconds[name].append(spent)
                told += each
    ours = statistics.median(seconds["owl"])
    for name, turns in seconds.items():
        middle = statistics.median(turns)
        row = {"engine": name, "precision": precision, "clients": clients, "context": context, "new": new}
        row |= {"tokens a second": round(clients * new / middle, 1), "owl's times its": round(middle / ours, 2)}
        if name == "owl":
            row |= {"TTFT ms": spread([one[0] for one in told]), "TPOT ms": spread([one[1] for one in told])}
        yield row


def spread(seconds: list[float]) -> dict[str, float]:
    """p50 and p99, in milliseconds."""
    ordered = sorted(seconds)
    return {
        "p50": round(1000 * ordered[len(ordered) // 2], 2),
        "p99": round(1000 * ordered[int(0.99 * len(ordered))], 2),
    }
