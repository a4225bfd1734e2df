"""Steps of next tokens on a GPU: replayed with one call each, since launching a thousand kernels one by one takes
several times as long as they do; and begun ahead, while the host still deals with the tokens of the step before.

A row of such a step is a slot (attention.py), whether a request has it or not, so that all that changes from step to
step are numbers in tensors that stay where they are. A graph is captured when its number of slots and of keys, in
powers of two, first comes up; compiled, its kernels are also fewer.

A step ahead supposes that all go on with their likeliest tokens. Where it turns out otherwise its logits are not used,
and what it left in the slots lies behind what anyone has, or is written anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.requests import FutureRequestState

from pipelines.serving.attention import Pages, Piece, Plan, Slots

FEWEST_KEYS = 256


class NextTokens:
    """The attention of a step whose row i is slot i's next token. Filled layer by layer."""

    def __init__(self, held: list[tuple[torch.Tensor, torch.Tensor]], places: torch.Tensor, mask: torch.Tensor):
        self.held, self.places, self.mask = held, places, mask
        self.rows = torch.arange(len(places), device=places.device)
        self.made: list[torch.Tensor] = []

    def attend(self, query, key, value, layer: int, scaling: float | None) -> torch.Tensor:
        """[1, heads, S, d] → [1, S, heads, d]. Queries that share a key stand in one call as if they followed each
        other: all of them see all of its slot's keys."""
        keys, values = self.held[layer]
        slots, length = len(self.rows), self.mask.shape[-1]
        for held, new in ((keys, key), (values, value)):
            self.made.append(new[0].transpose(0, 1).to(held.dtype))
            held[self.rows, self.places] = self.made[-1]
        attended = scaled_dot_product_attention(
            query[0].transpose(0, 1).to(keys.dtype).unflatten(1, (keys.shape[2], -1)),
            keys[:slots, :length].transpose(1, 2),
            values[:slots, :length].transpose(1, 2),
            attn_mask=self.mask,
            scale=scaling,
        )
        return attended.flatten(1, 2).unsqueeze(0).to(query.dtype)


@dataclass
class Turn:
    """A step's tensors. Two take turns, each of which leaves the other's ``given``."""

    given: torch.Tensor
    """[3, S]: token, slot, and place in it of each packed row; those that are nobody's have the slot S."""
    logits: torch.Tensor | None = None
    """[S, V] of the packed rows"""
    made: torch.Tensor | None = None
    """[S, 2 · layers, heads, d]: their keys and values"""
    graph: Any = None
    """torch.cuda.CUDAGraph; None where there is no GPU, and the step is computed as it stands."""
    done: Any = None
    """torch.cuda.Event"""


class Ahead(NamedTuple):
    """A step that was begun before it was asked for."""

    shape: tuple[int, int]
    turn: Turn
    after: Turn
    slots: list[int]
    ends: list[int]


class Graphs:
    """Steps of next tokens → their logits."""

    def __init__(
        self,
        decoder: nn.Module,
        head: nn.Module,
        words: nn.Embedding,
        slots: Slots,
        compiled: bool,
        forbidden: Sequence[int] = (),
    ):
        """``forbidden`` tokens are never the likeliest."""
        self.decoder, self.head, self.words, self.slots = decoder, head, words, slots
        self.device = words.weight.device
        self.forbidden = torch.tensor(forbidden, dtype=torch.long, device=self.device)
        self.one = self.many = self.forward
        if compiled:  # a single row is read fastest by kernels of Inductor's own, tuned for it
            settings: dict[str, Any] = {"fullgraph": True, "dynamic": True}
            tuned = {"options": {"coordinate_descent_tuning": True}}
            self.one = torch.compile(lambda *given: self.forward(*given), **settings, **tuned)
            self.many = torch.compile(lambda *given: self.forward(*given), **settings)
        self.turns: dict[tuple[int, int], tuple[Turn, Turn]] = {}
        self.pages: Pages | None = None
        self.held: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.stream = torch.cuda.Stream() if self.device.type == "cuda" else None
        self.ahead: Ahead | None = None
        self.foreseen = 0
        """Steps that had been begun ahead."""

    def fit(self, plan: Plan, requests: Sequence[FutureRequestState], cache: PagedAttentionCache) -> bool:
        """Whether this step is one of next tokens alone: words that answers have so far, each in its slot."""
        if plan.alone or not plan.together or len(cache.cache_allocators) > 1:
            return False
        size, length = shape_of(plan.together)
        return size * length <= self.slots.tokens and all(request.state.generated_tokens for request in requests)

    def __call__(
        self, write: torch.Tensor, plan: Plan, requests: Sequence[FutureRequestState], cache: PagedAttentionCache
    ) -> torch.Tensor:
        """``write`` [R]: the places that the pages have for these tokens → [1, R, V]"""
        ids = [request.state.generated_tokens[-1] for request in requests]
        slots = [piece.slot or 0 for piece in plan.together]
        ends = [piece.high - piece.low - 1 for piece in plan.together]
        shape, rows = shape_of(plan.together), len(slots)
        found = self.ahead
        foreseen = found is not None and (found.shape, found.slots, found.ends) == (shape, slots, ends)
        if found is not None and foreseen and found.turn.given[0, :rows].tolist() == ids:
            now, other = found.turn, found.after
            self.foreseen += 1
        else:
            self.settle()
            now, other = self.of(shape, cache)
            rest = shape[0] - rows
            given = [[*ids, *[0] * rest], [*slots, *[shape[0]] * rest], [*ends, *[0] * rest]]
            now.given.copy_(torch.tensor(given))
            self.begin(now, other, shape[1])
        self.ahead = None
        if now.done is not None:
            torch.cuda.current_stream().wait_event(now.done)
        assert self.pages is not None
        assert now.made is not None
        assert now.logits is not None
        self.pages.write(write, now.made[:rows])
        if max(ends) + 2 <= shape[1] and all(goes_on(request) for request in requests):
            self.begin(other, now, shape[1])
            self.ahead = Ahead(shape, other, now, slots, [end + 1 for end in ends])
        return now.logits[None, :rows]

    def settle(self) -> None:
        """What follows on this stream comes after the step ahead, which is given up."""
        if self.stream is not None and self.ahead is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        self.ahead = None

    def begin(self, turn: Turn, other: Turn, length: int) -> None:
        if turn.graph is None:
            self.compute(turn, other, length)
            return
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            turn.graph.replay()
            turn.done.record()

    def compute(self, turn: Turn, other: Turn, length: int) -> None:
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):  # those that take a mask
            step = self.one if turn.given.shape[1] == 1 else self.many
            turn.logits, turn.made, following = step(turn.given, self.held, length)
        other.given.copy_(following)

    def forward(
        self, given: torch.Tensor, held: list[tuple[torch.Tensor, torch.Tensor]], length: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """given [3, S] → logits [S, V], new keys and values [S, 2 · layers, heads, d], what is given next [3, S]"""
        slots, size = given[1], given.shape[1]

        def by_slot(values: torch.Tensor, rest: int) -> torch.Tensor:
            return values.new_full((size + 1,), rest).index_copy(0, slots, values)[:size]

        ids, ends = by_slot(given[0], 0), by_slot(given[2], 0)
        nowhere = held[0][0].shape[1] - 1
        seen = torch.arange(length, device=given.device) <= ends[:, None]
        mask = torch.zeros(size, length, dtype=held[0][0].dtype, device=given.device)
        mask = mask.masked_fill(~seen, -torch.inf)[:, None, None]
        attention = NextTokens(held, by_slot(given[2], nowhere), mask)
        hidden = self.decoder(
            inputs_embeds=self.words(ids)[None], position_ids=ends[None], use_cache=False, next_tokens=attention
        ).last_hidden_state
        packed = slots.clamp(max=size - 1)
        logits = self.head(hidden[0].index_select(0, packed))
        likeliest = logits.index_fill(1, self.forbidden, -torch.inf).argmax(1)
        following = torch.stack([likeliest, slots, torch.where(slots < size, given[2] + 1, 0)])
        return logits, torch.stack(attention.made, dim=1).index_select(0, packed), following

    def of(self, shape: tuple[int, int], cache: PagedAttentionCache) -> tuple[Turn, Turn]:
        """The turns for so many slots and keys."""
        self.pages = self.pages or Pages.of(cache)
        flat, layers = self.pages.flat, len(self.pages.shifts) // 2
        held = [self.slots.layer(layer, *shape, flat) for layer in range(layers)]
        if not self.held or held[0][0] is not self.held[0][0]:  # there was no room in them
            self.turns.clear()
            self.held = held
        if shape not in self.turns:
            self.turns[shape] = self.capture(*shape)
        return self.turns[shape]

    @torch.no_grad()
    def capture(self, size: int, length: int) -> tuple[Turn, Turn]:
        nobody = torch.tensor([[0], [size], [0]], device=self.device).repeat(1, size)
        turns = Turn(nobody), Turn(nobody.clone())
        if self.stream is None:
            return turns
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # compiles and tunes, which a capture must not
            for _ in range(2):
                self.compute(*turns, length)
        torch.cuda.current_stream().wait_stream(self.stream)
        for turn, other in (turns, turns[::-1]):
            turn.graph, turn.done = torch.cuda.CUDAGraph(), torch.cuda.Event()
            with torch.cuda.graph(turn.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.compute(turn, other, length)
        return turns

    def warm(self, cache: PagedAttentionCache) -> None:
        """Captures, and so compiles, one slot and two: others differ from these in their sizes alone."""
        for size in (1, 2):
            self.of((size, FEWEST_KEYS), cache)


def shape_of(together: Sequence[Piece]) -> tuple[int, int]:
    """Slots and keys of a step's graph: powers of two that hold them."""
    slots = 1 + max(piece.slot or 0 for piece in together)
    keys = max(FEWEST_KEYS, *(piece.high - piece.low for piece in together))
    return 1 << (slots - 1).bit_length(), 1 << (keys - 1).bit_length()


def goes_on(request: FutureRequestState) -> bool:
    """Whether, as far as one knows, its likeliest next token is taken and is not its last."""
    state, sampling = request.state, request.state.logit_processor_kwargs["sampling"]
    shaped = sampling.temperature or sampling.presence_penalty or sampling.frequency_penalty or sampling.schema_
    return not shaped and len(state.generated_tokens) + 1 < state.max_new_tokens
