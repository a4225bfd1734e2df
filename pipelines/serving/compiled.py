"""A decoder's steps as one compiled graph, for CPUs: weights are packed for the kernels that read them, and small
operations are not dispatched one by one.

Attention stays what it is (attention.py): to the compiler it is an operator that knows its layer, and finds the rest in
the step that is being computed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import nn

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, float], torch.Tensor]
"""query, key, value [1, heads, Q, d], the layer, the scale → [1, Q, heads, d]"""


class Compiled:
    """Rows of tokens, of any number of requests → the logits of some of them."""

    def __init__(self, decoder: nn.Module, head: nn.Module):
        self.decoder, self.head = decoder, head
        self.attend: Attend | None = None
        """Of the step that is being computed; None while nothing is."""
        self.rows = 0
        self.number = next(NUMBERS)
        COMPILED[self.number] = self
        # No Python runs between kernels, small ones do not wake another OpenMP team, matrices that read the same rows
        # are one, and the weights, which nobody changes, are not looked at again before each step.
        options = {"cpp_wrapper": True, "cpp.threads": 1, "cpp.enable_concat_linear": True}
        options |= {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        self.graph = torch.compile(self.forward, fullgraph=True, dynamic=True, options=options)

    def forward(self, embeds: torch.Tensor, position_ids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """[1, R, D], [1, R], [R'] → [1, R', V]"""
        out = self.decoder(inputs_embeds=embeds, position_ids=position_ids, use_cache=False, compiled=self.number)
        return self.head(out.last_hidden_state[:, kept])

    @torch.no_grad()
    def compile(self, width: int, dtype: torch.dtype) -> None:
        """Takes about a minute."""
        # Weights become constants, packed for their kernels. As an option of torch.compile this is heard too late, when
        # they are inputs already.
        with torch._inductor.config.patch(freezing=True):
            self.graph(torch.zeros(1, 4, width, dtype=dtype), torch.zeros(1, 4, dtype=torch.int32), torch.arange(3))

    def __call__(
        self, embeds: torch.Tensor, position_ids: torch.Tensor, kept: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        self.attend, self.rows = attend, embeds.shape[1]
        # Copies, since the graph for a view of another tensor would be another; so would be one for a single row.
        rows, places = (2 if number == 1 else 1 for number in (self.rows, len(kept)))
        try:
            logits = self.graph(embeds.repeat(1, rows, 1), position_ids.repeat(1, rows), kept.repeat(places))
            return logits[:, : len(kept)]
        finally:
            self.attend = None


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
    if engine.attend is not None:
        rows = engine.rows
        query, key, value = (each[:, :, :rows] for each in (query, key, value))
        out[:, :rows] = engine.attend(query, key, value, layer, scaling)
    return out


@attended.register_fake
def shape_of(query, key, value, layer, scaling, compiled):
    return query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
