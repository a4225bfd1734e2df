"""How fast the model is beside the plain composition of transformers' own CLIP, Q-Former and LLaMA at the same shapes.

Both see the same pictures and words, both attend with SDPA, and turns are taken, so that what else the machine does
hits both alike. The Q-Former's feed-forward width is chosen so that the two do the same number of multiplications, and
every position has a label; where only the words have, as in training, Owl also spares the head the other rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from owl_model import OwlAbstractorConfig, OwlConfig, OwlForConditionalGeneration, OwlVisionConfig

VISION = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
TEXT = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12, "num_attention_heads": 8}
QUERIES, PATCH, SIDE, BATCH, LENGTH, VOCABULARY, NEW = 64, 14, 224, 4, 256, 32000, 32
READER_WIDTH = 512


class Plain(nn.Module):
    """What one would write in an afternoon: CLIP's features, read by a Q-Former, projected among LLaMA's words."""

    def __init__(self) -> None:
        super().__init__()
        clip = CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH)
        reader = Blip2QFormerConfig(
            hidden_size=384,
            intermediate_size=READER_WIDTH,
            num_hidden_layers=6,
            num_attention_heads=6,
            encoder_hidden_size=384,
            cross_attention_frequency=1,
        )
        self.vision = CLIPVisionModel(clip)
        self.queries = nn.Parameter(torch.randn(1, QUERIES, 384))
        self.reader = Blip2QFormerModel(reader)
        self.project = nn.Linear(384, 512)
        self.end = nn.Parameter(torch.randn(1, 1, 512))
        self.language = LlamaForCausalLM(LlamaConfig(**TEXT, vocab_size=VOCABULARY))

    def embed(self, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        features = self.vision(pixel_values=pixels).last_hidden_state
        queries = self.queries.expand(len(pixels), -1, -1)
        tokens = self.project(self.reader(query_embeds=queries, encoder_hidden_states=features).last_hidden_state)
        tokens = torch.cat([tokens, self.end.expand(len(pixels), -1, -1)], dim=1)
        visual = (ids == VOCABULARY).unsqueeze(-1)
        words = self.language.get_input_embeddings()(ids.masked_fill(ids == VOCABULARY, 0))
        return words.masked_scatter(visual, tokens)

    def forward(self, ids: torch.Tensor, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.language(inputs_embeds=self.embed(ids, pixels), labels=labels).loss

    def generate(self, ids: torch.Tensor, pixels: torch.Tensor, options: GenerationConfig) -> torch.Tensor:
        mask = torch.ones_like(ids)
        embeds = self.embed(ids, pixels)
        return self.language.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=options)


def owl() -> OwlForConditionalGeneration:
    return OwlForConditionalGeneration(
        OwlConfig(
            vision_config=OwlVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH),
            abstractor_config=OwlAbstractorConfig(
                hidden_size=384,
                encoder_hidden_size=384,
                intermediate_size=1024,
                num_hidden_layers=6,
                num_attention_heads=6,
                num_queries=QUERIES,
            ),
            text_config=LlamaConfig(**TEXT, vocab_size=VOCABULARY),
        )
    )


def measure(repeats: int) -> Iterator[dict[str, Any]]:
    """Yields {"what", "owl_s", "plain_s", "ratio" = owl / plain, "owl_gflop", "plain_gflop", "bound_s"}: medians, and
    the time that Owl's multiplications alone would take at the rate of a large matrix product here."""
    torch.manual_seed(0)
    ours, theirs = owl(), Plain()
    pixels = torch.randn(BATCH, 3, SIDE, SIDE)
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    ids[:, 8 : 8 + QUERIES + 1] = VOCABULARY
    everywhere = torch.randint(3, VOCABULARY, ids.shape)
    words = ids.masked_fill(ids == VOCABULARY, -100)
    options = GenerationConfig(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
    mask = torch.ones_like(ids)
    given = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}

    def learn_ours(labels: torch.Tensor) -> None:
        ours(**given, labels=labels).loss.backward()

    def learn_theirs(labels: torch.Tensor) -> None:
        theirs(ids, pixels, labels).backward()

    def speak_ours() -> None:
        ours.generate(**given, generation_config=options)

    def speak_theirs() -> None:
        theirs.generate(ids, pixels, options)

    rate = matrix_rate()
    parts: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "forward and backward": (partial(learn_ours, everywhere), partial(learn_theirs, everywhere)),
        "forward and backward, words supervised": (partial(learn_ours, words), partial(learn_theirs, words)),
        f"greedy decoding of {NEW} tokens": (speak_ours, speak_theirs),
    }
    for what, (one, other) in parts.items():
        for module in (ours, theirs):
            module.train("decoding" not in what).requires_grad_("decoding" not in what)
        flops = [count(one), count(other)]
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            for run, taken in zip((one, other), times, strict=True):
                began = time.perf_counter()
                run()
                taken.append(time.perf_counter() - began)
                ours.zero_grad()
                theirs.zero_grad()
        seconds = [statistics.median(taken) for taken in times]
        yield {
            "what": what,
            "owl_s": round(seconds[0], 3),
            "plain_s": round(seconds[1], 3),
            "ratio": round(seconds[0] / seconds[1], 3),
            "owl_gflop": round(flops[0] / 1e9, 1),
            "plain_gflop": round(flops[1] / 1e9, 1),
            "bound_s": round(flops[0] / rate, 3),
        }


def count(run: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def matrix_rate(side: int = 1024) -> float:
    """Operations a second of a square fp32 matrix product: the best of ten."""
    left, right = torch.randn(side, side), torch.randn(side, side)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best
