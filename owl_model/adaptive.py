"""mPLUG-Owl2's modality-adaptive module (arXiv 2311.04257, section 3.2, figure 3).

Each decoder layer keeps one query projection, output projection and MLP, and two copies of both norms and of the key
and value projections: ``multiway.0`` for words, ``multiway.1`` for visual tokens (mPLUG-Owl2.1: of query, key and
value). Every row of the sequence goes through the copy of its modality; attention itself runs over all rows as usual.

`make_adaptive` turns a transformers decoder of LLaMA's layer shape into one, in place. Rows are sorted once for the
whole model, so that a layer has no loop, no mask and no row computed twice.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

ADAPTABLE = ("llama", "mistral", "qwen2", "qwen3")
"""Decoders of LLaMA's layer shape, by model_type."""


DOUBLED = ("input_layernorm", "post_attention_layernorm", "q_proj", "k_proj", "v_proj")
"""What a layer may keep twice."""


class Rows(NamedTuple):
    """Where words and visual tokens stand in the flattened batch [B·L], and the way back from (words, visual)."""

    text: torch.Tensor
    image: torch.Tensor
    back: torch.Tensor


def sort_rows(is_visual: torch.Tensor) -> Rows | None:
    """[B, L] → Rows; None where all are words, as in decoding."""
    flat = is_visual.flatten()
    image = flat.nonzero().squeeze(1)
    if not len(image):
        return None
    text = (~flat).nonzero().squeeze(1)
    return Rows(text, image, torch.cat([text, image]).argsort())


class Multiway(nn.Module):
    """Two copies of a module that works row by row; the second starts as a copy of the first."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.multiway = nn.ModuleList([module, deepcopy(module)])

    def forward(self, hidden: torch.Tensor, rows: Rows | torch.Tensor | None) -> torch.Tensor:
        """``rows`` as a mask [B, L, 1] sends all rows through both copies: it costs more, and is for engines whose
        layers count on seeing every row."""
        words, visual = self.multiway
        if rows is None:
            return words(hidden)
        if isinstance(rows, torch.Tensor):
            return torch.where(rows, visual(hidden), words(hidden))
        flat = hidden.flatten(0, -2)
        both = torch.cat([words(flat.index_select(0, rows.text)), visual(flat.index_select(0, rows.image))])
        return both.index_select(0, rows.back).unflatten(0, hidden.shape[:-1])


def routed(module: nn.Module, twice: bool) -> nn.Module:
    return Multiway(module) if twice else module


def send(module: nn.Module, hidden: torch.Tensor, rows: Rows | torch.Tensor | None) -> torch.Tensor:
    return module(hidden, rows) if isinstance(module, Multiway) else module(hidden)


class ModalityAdaptiveAttention(nn.Module):
    def __init__(self, attention: nn.Module, twice: Collection[str]):
        super().__init__()
        self.config = attention.config
        self.layer_idx = attention.layer_idx
        self.head_dim = attention.head_dim
        self.num_key_value_groups = attention.num_key_value_groups
        self.scaling = attention.scaling
        self.is_causal = True
        self.window = (
            {} if getattr(attention, "sliding_window", None) is None else {"sliding_window": attention.sliding_window}
        )
        self.q_proj = routed(attention.q_proj, "q_proj" in twice)
        self.k_proj = routed(attention.k_proj, "k_proj" in twice)
        self.v_proj = routed(attention.v_proj, "v_proj" in twice)
        self.o_proj = attention.o_proj
        self.q_norm = getattr(attention, "q_norm", nn.Identity())  # Qwen3 has them
        self.k_norm = getattr(attention, "k_norm", nn.Identity())

    def forward(
        self, hidden, rows, position_embeddings, attention_mask, past_key_values=None, **kwargs
    ) -> torch.Tensor:
        """[B, L, D] → [B, L, D]"""
        query = self.q_norm(send(self.q_proj, hidden, rows).unflatten(-1, (-1, self.head_dim)))
        key = self.k_norm(send(self.k_proj, hidden, rows).unflatten(-1, (-1, self.head_dim)))
        value = send(self.v_proj, hidden, rows).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        options = {"dropout": dropout, "scaling": self.scaling, **self.window, **kwargs}
        out, _ = attend(self, query, key, value, attention_mask, **options)
        return self.o_proj(out.reshape(*hidden.shape[:-1], -1))


class ModalityAdaptiveLayer(GradientCheckpointingLayer):
    """A decoder layer that routes rows by modality; ``rows`` reaches it through the decoder's keyword arguments."""

    def __init__(self, layer: nn.Module, twice: Collection[str]):
        super().__init__()
        self.self_attn = ModalityAdaptiveAttention(layer.self_attn, twice)
        self.mlp = layer.mlp
        self.input_layernorm = routed(layer.input_layernorm, "input_layernorm" in twice)
        self.post_attention_layernorm = routed(layer.post_attention_layernorm, "post_attention_layernorm" in twice)

    def forward(self, hidden: torch.Tensor, rows: Rows | torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        normed = send(self.input_layernorm, hidden, rows)
        hidden = hidden + self.self_attn(normed, rows, **kwargs)
        return hidden + self.mlp(send(self.post_attention_layernorm, hidden, rows))


def make_adaptive(decoder: PreTrainedModel, twice: Collection[str]) -> None:
    """Gives every layer second copies, equal to the first, of the modules named. Raises ValueError for a decoder of
    another shape, and for a module that cannot be doubled."""
    if unknown := set(twice) - set(DOUBLED):
        raise ValueError(f"adaptive_modules has {', '.join(sorted(unknown))}; known: {', '.join(DOUBLED)}")
    kind = decoder.config.model_type
    if kind not in ADAPTABLE:
        known = ", ".join(ADAPTABLE)
        raise ValueError(f"the modality-adaptive module fits decoders of LLaMA's shape ({known}), not {kind!r}")
    decoder.layers = nn.ModuleList(ModalityAdaptiveLayer(layer, twice) for layer in decoder.layers)
    decoder._no_split_modules = ["ModalityAdaptiveLayer"]
