"""Attention in rows of several samples on a GPU, each sample by itself: PyTorch's variable-length flash attention.

Elsewhere such rows are told apart by a mask (OwlProcessor.pack), which has every token looked at by all of its row:
most of the attention's work in a row of 2,048 tokens, all for nothing.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "owl_packed"


def cuts_of(position_ids: torch.Tensor) -> dict[str, torch.Tensor | int]:
    """[B, L], which start again with each sample → where in [B · L] each begins, and the longest's length."""
    places = (position_ids.flatten() == 0).nonzero().flatten()
    cuts = nn.functional.pad(places, (0, 1), value=position_ids.numel()).int()
    return {"cuts": cuts, "longest": int(cuts.diff().max())}


def packed_attention(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask,
    scaling: float | None = None,
    cuts: torch.Tensor | None = None,
    longest: int = 0,
    sliding_window: int | None = None,
    **kwargs,
):
    """[B, heads, L, d] → [B, L, heads, d]; as transformers' SDPA where no ``cuts`` are given."""
    if cuts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) if groups > 1 else each for each in (key, value))
    rows = [each.transpose(1, 2).flatten(0, 1).to(torch.bfloat16) for each in (query, key, value)]
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    out = varlen_attn(*rows, cuts, cuts, longest, longest, scale=scaling, window_size=window)
    assert isinstance(out, torch.Tensor)
    return out.unflatten(0, (query.shape[0], -1)), None


def register() -> str:
    """Makes the attention known to transformers; returns its name there."""
    AttentionInterface.register(NAME, packed_attention)
    return NAME
