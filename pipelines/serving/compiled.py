"""A decoder's next tokens as one compiled graph, for CPUs: weights are packed for the kernels that read them, and small
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


class NextTokens:
    """Rows of one token each → their logits."""

    def __init__(self, decoder: nn.Module, head: nn.Module):
        self.decoder, self.head = decoder, head
        self.attend: Attend | None = None
        """Of the step that is being computed; None while nothing is."""
        self.rows = 0
        self.number = next(NUMBERS)
        COMPILED[self.number] = self
        # Weights are packed once, no Python runs between kernels, and small ones do not wake another OpenMP team.
        options = {"freezing": True, "cpp_wrapper": True, "cpp.threads": 1}
        self.graph = torch.compile(self.forward, fullgraph=True, dynamic=True, options=options)

    def forward(self, embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """[1, R, D], [1, R] → [1, R, V]"""
        out = self.decoder(inputs_embeds=embeds, position_ids=position_ids, use_cache=False, compiled=self.number)
        return self.head(out.last_hidden_state)

    @torch.no_grad()
    def compile(self, width: int, dtype: torch.dtype) -> None:
        """Takes about a minute."""
        self.graph(torch.zeros(1, 4, width, dtype=dtype), torch.arange(4, dtype=torch.int32)[None])

    def __call__(self, embeds: torch.Tensor, position_ids: torch.Tensor, attend: Attend) -> torch.Tensor:
        self.attend, self.rows = attend, embeds.shape[1]
        if self.rows == 1:  # a graph for one row would be another
            embeds, position_ids = embeds.expand(-1, 2, -1), position_ids.expand(-1, 2)
        try:
            return self.graph(embeds.contiguous(), position_ids.contiguous())[:, : self.rows]
        finally:
            self.attend = None


NUMBERS = count()
COMPILED: WeakValueDictionary[int, NextTokens] = WeakValueDictionary()
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
