"""Attention for continuous batching on the CPU: each request by itself, straight from the paged cache.

transformers packs the requests of a batch into one sequence, builds a mask of all queries by all keys, and gathers
every request's keys and values in every layer. Here a request's rows attend to its own keys alone, and where those lie
side by side in the cache, as they do while its pages follow each other, nothing is copied. Keys and values are held in
fp32: one query against them in bf16 takes six to eight times as long on a CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "owl_paged"


class Piece(NamedTuple):
    """One request's part of a batch: its queries, and where its keys and values lie in the cache."""

    first: int
    end: int
    start: int | None
    """Of its keys in the cache, where they lie side by side; None where they are to be gathered."""
    length: int
    places: torch.Tensor | None


def pieces_of(queries: torch.Tensor, keys: torch.Tensor, places: torch.Tensor) -> list[Piece]:
    """A batch's requests by their cumulative lengths [R + 1]; ``places`` [K] are all keys' places in the cache."""
    ends, key_ends, order = queries.tolist(), keys.tolist(), places.tolist()
    found = []
    for index in range(len(ends) - 1):
        first, end, low, high = ends[index], ends[index + 1], key_ends[index], key_ends[index + 1]
        if end <= first:
            continue
        together = order[high - 1] - order[low] == high - 1 - low
        found.append(
            Piece(first, end, order[low] if together else None, high - low, None if together else places[low:high])
        )
    return found


def paged_attention(module, query, key, value, attention_mask, scaling=None, cache=None, watch=None, **kwargs):
    """[1, heads, Q, d] → [1, Q, heads, d]; as transformers' SDPA, shown to ``watch``, where there is no paged
    cache."""
    if not isinstance(cache, PagedAttentionCache):
        if watch is not None:
            watch.see(query, key, scaling)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    allocator = cache.layer_to_allocator[module.layer_idx]
    keys, values = allocator._kv_token_views[module.layer_idx]
    write = kwargs["write_index"][allocator.index]
    keys.index_copy_(0, write, key.squeeze(0).transpose(0, 1).to(keys.dtype))
    values.index_copy_(0, write, value.squeeze(0).transpose(0, 1).to(values.dtype))
    read = kwargs["read_index"][allocator.index]
    places = read if read.numel() else write  # a batch that has no past reads what it has just written
    pieces = pieces_of(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"][allocator.layer_type], places)
    asked = query.to(keys.dtype)
    shared = query.shape[1] != keys.shape[1]
    out = asked.new_empty(query.shape[2], query.shape[1], query.shape[3])
    for piece in pieces:
        some = slice(piece.start, piece.start + piece.length) if piece.start is not None else piece.places
        near_keys, near_values = (held[some].transpose(0, 1).unsqueeze(0) for held in (keys, values))
        rows = piece.end - piece.first
        mask = None
        if 1 < rows < piece.length:  # the first of these queries follows what is in the cache already
            mask = torch.ones(rows, piece.length, dtype=torch.bool).tril(piece.length - rows)
        attended = scaled_dot_product_attention(
            asked[:, :, piece.first : piece.end],
            near_keys,
            near_values,
            attn_mask=mask,
            is_causal=rows == piece.length and rows > 1,
            scale=scaling,
            enable_gqa=shared,
        )
        out[piece.first : piece.end] = attended[0].transpose(0, 1)
    return out.unsqueeze(0).to(query.dtype), None


def register() -> str:
    """Makes the attention known to transformers; returns its name there."""
    AttentionInterface.register(NAME, paged_attention)
    return NAME
