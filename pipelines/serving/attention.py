"""Attention for continuous batching.

transformers packs the requests of a batch into one sequence, builds a mask of all queries by all keys, and gathers
every request's keys and values in every layer, at every token. Here a prompt attends by itself, to its own pages; and
the keys and values of requests that are being answered lie once more side by side, so that all their next tokens attend
in one call, and nothing is gathered. On a CPU they are held in fp32: one query against them in bf16 takes six to eight
times as long.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "owl_paged"
CPU = torch.device("cpu")


class Piece(NamedTuple):
    """One request's part of a step: queries ``first`` … ``end``, keys ``low`` … ``high`` among all requests'."""

    first: int
    end: int
    low: int
    high: int
    slot: int | None
    """Where its keys and values lie once more."""


@dataclass
class Plan:
    """A step, for all its layers."""

    alone: list[Piece]
    """Prompts, and what has no slot: each attends by itself."""
    together: list[Piece]
    """The next tokens of requests that have a slot: they attend in one call."""
    device: torch.device

    @cached_property
    def rows(self) -> torch.Tensor:
        """[R] of the packed queries: the next tokens."""
        return self.numbers([piece.first for piece in self.together])

    @cached_property
    def slots(self) -> torch.Tensor:
        """[R]"""
        return self.numbers([piece.slot for piece in self.together])

    @cached_property
    def ends(self) -> torch.Tensor:
        """[R]: the last place of each one's keys, where its own go."""
        return self.numbers([piece.high - piece.low - 1 for piece in self.together])

    @cached_property
    def mask(self) -> torch.Tensor | None:
        """[S, 1, 1, K]: which keys each slot has."""
        if not self.together:
            return None
        last = self.ends.new_zeros(int(self.slots.max()) + 1)
        last[self.slots] = self.ends
        return (torch.arange(int(self.ends.max()) + 1, device=self.device) <= last[:, None])[:, None, None]

    @cached_property
    def span(self) -> slice | None:
        """The slots, where there are next tokens only and their rows come in the order of slots that follow each
        other."""
        order = [piece.slot for piece in self.together if piece.slot is not None]
        first, end = (order[0], order[0] + len(order)) if order else (0, 0)
        return slice(first, end) if order and not self.alone and order == list(range(first, end)) else None

    def numbers(self, values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


class Slots:
    """Keys and values of the running requests, by layer [S, K + 1, heads, d]; a slot is a request's own until it
    leaves. The last place is nobody's."""

    def __init__(self, requests: int, tokens: int, device: torch.device = CPU):
        """``tokens`` are held at most, over all slots, as many as the slots' longest has in each."""
        self.free, self.tokens, self.device = list(range(requests)), tokens, device
        self.of: dict[str, int] = {}
        self.filled: dict[int, int] = {}
        """Slot → how many tokens it holds, in every layer."""
        self.held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def plan(self, requests: Sequence[FutureRequestState]) -> Plan:
        alone, together = [], []
        first = low = 0
        for request in requests:
            length, rows, name = request.state.position_offset, request.query_length, request.state.request_id
            slot = self.slot(name)
            piece = Piece(first, first + rows, low, low + length, slot)
            first, low = piece.end, piece.high
            if slot is not None and rows == 1 and self.filled.get(slot) == length - 1:
                together.append(piece)
            else:
                alone.append(piece)
            if slot is not None:
                self.filled[slot] = length
        longest = max((piece.high - piece.low for piece in (*alone, *together)), default=0)
        if longest * (1 + max(self.of.values(), default=0)) > self.tokens:
            self.filled.clear()
            return Plan([*alone, *together], [], self.device)
        return Plan(alone, together, self.device)

    def slot(self, name: str) -> int | None:
        if name not in self.of and self.free:
            self.of[name] = heapq.heappop(self.free)
            self.filled.pop(self.of[name], None)
        return self.of.get(name)

    def leave(self, name: str) -> None:
        if name in self.of:
            heapq.heappush(self.free, self.of.pop(name))

    def layer(self, number: int, slots: int, length: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values, with room for so many slots of so many tokens; ``like`` [places, heads, d]."""
        held = self.held.get(number)
        if held is None or held[0].shape[0] < slots or held[0].shape[1] <= length:
            before = held[0].shape[1] - 1 if held else 0
            slots = max(slots, 1 + max(self.of.values(), default=0))
            length = max(length, min(max(64, 2 * length, before), self.tokens // slots))
            other = tuple(like.new_zeros(slots, length + 1, *like.shape[1:]) for _ in range(2))
            if held:
                both = slice(min(len(held[0]), slots)), slice(min(before, length))
                for old, new in zip(held, other, strict=True):
                    new[both] = old[both]
            held = self.held[number] = (other[0], other[1])
            self.filled = {slot: tokens for slot, tokens in self.filled.items() if tokens <= length}
        return held


class Pages(NamedTuple):
    """The paged cache as one tensor, where a prompt's pages are found again. Of caches whose layers are all of one
    kind."""

    flat: torch.Tensor
    """[places, heads, d]: keys and values of all layers"""
    shifts: torch.Tensor
    """[2 · layers]: how far each layer's keys, then its values, lie behind the place that a token is given."""

    @classmethod
    def of(cls, cache: PagedAttentionCache) -> Pages:
        (allocator,) = cache.cache_allocators.values()
        views = [view for layer in sorted(allocator._kv_token_views) for view in allocator._kv_token_views[layer]]
        flat = min(views, key=lambda view: view.storage_offset())
        shifts = [(view.storage_offset() - flat.storage_offset()) // flat.stride(0) for view in views]
        return cls(flat, torch.tensor(shifts, device=flat.device))

    def write(self, places: torch.Tensor, made: torch.Tensor) -> None:
        """``made`` [R, 2 · layers, heads, d] at ``places`` [R]"""
        self.flat.index_copy_(0, (places[:, None] + self.shifts).flatten(), made.flatten(0, 1))


def paged_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    cache=None,
    watch: Any = None,
    plan: Plan | None = None,
    held: Slots | None = None,
    compiled: int | None = None,
    next_tokens: Any = None,
    **kwargs,
):
    """[1, heads, Q, d] → [1, Q, heads, d]; as transformers' SDPA, shown to ``watch``, where there is no paged cache.
    ``compiled`` is of a step that compiled.py computes, ``next_tokens`` of next tokens there or in graphs.py."""
    if next_tokens is not None:
        return next_tokens.attend(query, key, value, module.layer_idx, scaling), None
    if compiled is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return torch.ops.owl.attend(query, key, value, module.layer_idx, scale, compiled), None
    if not isinstance(cache, PagedAttentionCache):
        if watch is not None:
            watch.see(query, key, scaling)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    assert plan is not None
    assert held is not None
    paged = Paged(cache, plan, held, kwargs["read_index"], kwargs["write_index"])
    return paged.attend(query, key, value, module.layer_idx, scaling), None


class Paged(NamedTuple):
    """A step's attention, in any of its layers."""

    cache: PagedAttentionCache
    plan: Plan
    held: Slots
    read_index: list[torch.Tensor]
    write_index: list[torch.Tensor]

    def attend(self, query, key, value, layer: int, scaling: float | None) -> torch.Tensor:
        """[1, heads, Q, d] → [1, Q, heads, d]"""
        cache, plan, held = self.cache, self.plan, self.held
        allocator = cache.layer_to_allocator[layer]
        keys, values = allocator._kv_token_views[layer]
        write = self.write_index[allocator.index]
        new_keys, new_values = (one[0].transpose(0, 1).to(keys.dtype) for one in (key, value))  # [Q, heads, d]
        keys.index_copy_(0, write, new_keys)
        values.index_copy_(0, write, new_values)
        asked = query[0].transpose(0, 1).to(keys.dtype)  # [Q, heads, d]
        options = {"scale": scaling, "enable_gqa": query.shape[1] != keys.shape[1]}
        if plan.span is not None and plan.mask is not None:  # nothing to be sorted
            all_keys, all_values = held.layer(layer, plan.mask.shape[0], plan.mask.shape[3], keys)
            all_keys[plan.slots, plan.ends] = new_keys
            all_values[plan.slots, plan.ends] = new_values
            theirs = plan.span, slice(plan.mask.shape[3])
            attended = scaled_dot_product_attention(
                asked[:, :, None],
                all_keys[theirs].transpose(1, 2),
                all_values[theirs].transpose(1, 2),
                attn_mask=plan.mask[plan.span] if len(asked) > 1 else None,  # one alone sees all its keys
                **options,
            )
            return attended[None, :, :, 0].to(query.dtype)
        out = torch.empty_like(asked)
        if plan.alone:
            read = self.read_index[allocator.index]
            places = read if read.numel() else write  # a batch that has no past reads what it has just written
            for piece in plan.alone:
                near = [each[places[piece.low : piece.high]] for each in (keys, values)]
                if piece.slot in held.filled:
                    keep(held, layer, piece, near)
                out[piece.first : piece.end] = by_itself(asked[piece.first : piece.end], near[0], near[1], options)
        if plan.mask is not None:
            slots, longest = plan.mask.shape[0], plan.mask.shape[3]
            all_keys, all_values = held.layer(layer, slots, longest, keys)
            all_keys[plan.slots, plan.ends] = new_keys[plan.rows]
            all_values[plan.slots, plan.ends] = new_values[plan.rows]
            queries = asked.new_zeros(slots, *asked.shape[1:])
            queries[plan.slots] = asked[plan.rows]
            attended = scaled_dot_product_attention(
                queries[:, :, None],
                all_keys[:slots, :longest].transpose(1, 2),
                all_values[:slots, :longest].transpose(1, 2),
                attn_mask=plan.mask,
                **options,
            )
            out[plan.rows] = attended[plan.slots, :, 0]
        return out.unsqueeze(0).to(query.dtype)


def keep(held: Slots, number: int, piece: Piece, near: list[torch.Tensor]) -> None:
    """What a request has so far, into its slot."""
    assert piece.slot is not None
    length = piece.high - piece.low
    for all_of_them, own in zip(held.layer(number, piece.slot + 1, length, near[0]), near, strict=True):
        all_of_them[piece.slot, :length] = own


def by_itself(asked: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, options: dict) -> torch.Tensor:
    """[Q, heads, d] of one request, whose last Q keys are its queries' own → [Q, heads, d]"""
    rows, length = len(asked), len(keys)
    mask = None
    if 1 < rows < length:  # the first of these queries follows what is in the cache already
        mask = torch.ones(rows, length, dtype=torch.bool, device=keys.device).tril(length - rows)
    queries, near_keys, near_values = (each.transpose(0, 1)[None] for each in (asked, keys, values))
    causal = rows == length and rows > 1
    attended = scaled_dot_product_attention(
        queries, near_keys, near_values, attn_mask=mask, is_causal=causal, **options
    )
    return attended[0].transpose(0, 1)


def register() -> str:
    """Makes the attention known to transformers; returns its name there."""
    AttentionInterface.register(NAME, paged_attention)
    return NAME
