"""A decoder's steps as compiled graphs, for CPUs: small operations are fused, and not dispatched one by one.

Rows of any number of requests are one graph, in which weights are packed for the kernels that read them. Attention
stays what it is there (attention.py): to the compiler it is an operator that knows its layer, and finds the rest in the
step that is being computed.

The next token of a single request is another graph, with its attention in it. To multiply one row is to read each
weight once: plain loops do that as fast over weights as they lie, and the compiler joins them with all that is around
them, so that nothing is packed or called in between.
"""

from __future__ import annotations

import copy
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import nn
from transformers import PreTrainedConfig

from pipelines.serving.attention import Paged, Pages

LONGEST_ALONE = 4096
"""Beyond it Inductor sums keys in another way, which would be another graph."""


class Compiled:
    """Rows of tokens, of any number of requests → the logits of some of them."""

    def __init__(self, decoder: nn.Module, head: nn.Module):
        self.decoder, self.head = decoder, head
        self.single = by_rows(decoder), by_rows(head)
        self.pages: Pages | None = None
        self.step: Paged | None = None
        """That is being computed; None while nothing is."""
        self.rows = 0
        self.number = next(NUMBERS)
        COMPILED[self.number] = self
        # No Python runs between kernels, and weights, which nobody changes, are not looked at again before each step.
        options = {"cpp_wrapper": True, "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        self.alone = torch.compile(self.forward_alone, fullgraph=True, dynamic=True, options=options)
        # Small kernels do not wake another OpenMP team, and matrices that read the same rows are one.
        options |= {"cpp.threads": 1, "cpp.enable_concat_linear": True}
        self.graph = torch.compile(self.forward, fullgraph=True, dynamic=True, options=options)

    def forward(self, embeds: torch.Tensor, position_ids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """[1, R, D], [1, R], [R'] → [1, R', V]"""
        out = self.decoder(inputs_embeds=embeds, position_ids=position_ids, use_cache=False, compiled=self.number)
        return self.head(out.last_hidden_state[:, kept])

    def forward_alone(
        self, embed: torch.Tensor, place: torch.Tensor, held: list[tuple[torch.Tensor, torch.Tensor]], length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[D], [1], the slot's keys and values by layer, how many there are with this token's own → logits
        [1, 1, V], its keys and values [1, 2 · layers, heads, d]"""
        decoder, head = self.single
        token = NextToken(held, place, length)
        out = decoder(inputs_embeds=embed[None, None], position_ids=place[None], use_cache=False, next_tokens=token)
        return head(out.last_hidden_state), torch.stack(token.made)[None]

    @torch.no_grad()
    def compile(self, text: PreTrainedConfig, dtype: torch.dtype) -> None:
        """Takes more than a minute."""
        embeds = torch.zeros(1, 4, text.hidden_size, dtype=dtype)
        # Weights become constants, packed for their kernels. As an option of torch.compile this is heard too late, when
        # they are inputs already.
        with torch._inductor.config.patch(freezing=True):
            self.graph(embeds, torch.zeros(1, 4, dtype=torch.int32), torch.arange(3))
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        held = [(torch.zeros(99, heads, width), torch.zeros(99, heads, width)) for _ in range(text.num_hidden_layers)]
        self.alone(embeds[0, 0].clone(), torch.tensor([69]), held, 70)

    def __call__(
        self, embeds: torch.Tensor, position_ids: torch.Tensor, kept: torch.Tensor, step: Paged
    ) -> torch.Tensor:
        if fits_alone(step):
            return self.next_token(embeds, step)
        self.step, self.rows = step, embeds.shape[1]
        # Copies, since the graph for a view of another tensor would be another; so would be one for a single row.
        rows, places = (2 if number == 1 else 1 for number in (self.rows, len(kept)))
        try:
            logits = self.graph(embeds.repeat(1, rows, 1), position_ids.repeat(1, rows), kept.repeat(places))
            return logits[:, : len(kept)]
        finally:
            self.step = None

    def next_token(self, embeds: torch.Tensor, step: Paged) -> torch.Tensor:
        self.pages = self.pages or Pages.of(step.cache)
        (piece,) = step.plan.together
        slot, length = piece.slot or 0, piece.high - piece.low
        layers = range(len(self.pages.shifts) // 2)
        both = [step.held.layer(layer, slot + 1, length, self.pages.flat) for layer in layers]
        held = [(keys[slot], values[slot]) for keys, values in both]
        logits, made = self.alone(embeds[0, 0].clone(), step.plan.ends, held, length)
        self.pages.write(step.write_index[0], made)
        return logits


def fits_alone(step: Paged) -> bool:
    """Whether it is the next token of one request, whose other keys lie in its slot."""
    plan = step.plan
    if plan.alone or len(plan.together) != 1 or len(step.cache.cache_allocators) > 1:
        return False
    return 2 <= plan.together[0].high - plan.together[0].low <= LONGEST_ALONE


class NextToken:
    """The attention of a single row, filled layer by layer."""

    def __init__(self, held: list[tuple[torch.Tensor, torch.Tensor]], place: torch.Tensor, length: int):
        self.held, self.place, self.length = held, place, length
        self.made: list[torch.Tensor] = []

    def attend(self, query, key, value, layer: int, scaling: float | None) -> torch.Tensor:
        """[1, heads, 1, d] → [1, 1, heads, d]"""
        keys, values = self.held[layer]
        for held, new in ((keys, key), (values, value)):
            self.made.append(new[0, :, 0].to(held.dtype))
            held[self.place] = self.made[-1][None]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        asked = (query[0].to(keys.dtype) * scale).view(keys.shape[1], -1, 1, keys.shape[2])  # those that share a key
        near, theirs = (each[: self.length].transpose(0, 1)[:, None] for each in (keys, values))  # [heads, 1, K, d]
        weights = torch.softmax((asked * near).sum(-1), -1)
        return (weights[..., None] * theirs).sum(2).flatten(0, 1)[None, None].to(query.dtype)


class OneRow(nn.Linear):
    """Of one row, written as the loop that it is. Sums in fp32."""

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        """[1, 1, D] → [1, 1, D']"""
        product = (row.float().unsqueeze(-2) * self.weight.float()).sum(-1)
        return (product if self.bias is None else product + self.bias.float()).to(row.dtype)


def by_rows(module: nn.Module) -> nn.Module:
    """The same for one row, with the same weights."""
    tensors = (*module.parameters(), *module.buffers())
    twin = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for part in twin.modules():
        if type(part) is nn.Linear:
            part.__class__ = OneRow
    return twin


NUMBERS = count()
COMPILED: WeakValueDictionary[int, Compiled] = WeakValueDictionary()
"""An operator is given tensors and numbers, so it knows its engine by one."""


@torch.library.custom_op("owl::attend", mutates_args=())
def attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scaling: float, compiled: int
) -> torch.Tensor:
    """[1, heads, R, d] → [1, R, heads, d]"""
    engine = COMPILED[compiled]
    out = query.new_zeros(1, query.shape[2], query.shape[1], query.shape[3])
    if engine.step is not None:
        rows = engine.rows
        query, key, value = (each[:, :, :rows] for each in (query, key, value))
        out[:, :rows] = engine.step.attend(query, key, value, layer, scaling)
    return out


@attended.register_fake
def shape_of(query, key, value, layer, scaling, compiled):
    return query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
