"""The visual knowledge module: pictures → features.

    pixel_values [N, 3, H, W] → [N, P, Dv]        N pictures, P = (H / patch)² + 1 with the class token

`OwlVisionModel` is mPLUG-Owl's ViT with the released weights' layout: one fused ``query_key_value`` whose rows
are ordered [head, (q, k, v), head_dim] (Megatron's order), a position table of fixed length, and the last norm on
*all* tokens. Any transformers vision backbone can take its place; `flatten_features` brings a CNN's feature map
into the same shape.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from owl_model.config import OwlVisionConfig


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Plain attention, [N, heads, L, d] → [N, L, heads, d]; the fallback of transformers' attention interface."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class OwlVisionEmbeddings(nn.Module):
    def __init__(self, config: OwlVisionConfig):
        super().__init__()
        width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        self.image_size = config.image_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, patches + 1, width))
        self.patch_embed = nn.Conv2d(3, width, kernel_size=config.patch_size, stride=config.patch_size, bias=False)
        self.pre_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"pictures are {tuple(pixel_values.shape[-2:])}, the model takes {self.image_size} px")
        patches = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return self.pre_layernorm(tokens + self.position_embedding)


class OwlVisionAttention(nn.Module):
    def __init__(self, config: OwlVisionConfig):
        super().__init__()
        self.config = config
        self.heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.is_causal = False
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        fused = self.query_key_value(hidden).unflatten(-1, (self.heads, 3, self.head_dim))  # [N, P, heads, 3, d]
        query, key, value = fused.permute(3, 0, 2, 1, 4)  # each [N, heads, P, d]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        out, _ = attend(self, query, key, value, None, scaling=self.head_dim**-0.5, dropout=dropout)
        return self.dense(out.flatten(2))


class OwlVisionMLP(nn.Module):
    def __init__(self, config: OwlVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(hidden)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))  # QuickGELU, whatever the official config says


class OwlVisionLayer(GradientCheckpointingLayer):
    """A pre-norm block. The norms carry LLaMA's names in the released weights, but are LayerNorms."""

    def __init__(self, config: OwlVisionConfig):
        super().__init__()
        self.self_attn = OwlVisionAttention(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = OwlVisionMLP(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class OwlVisionEncoder(nn.Module):
    def __init__(self, config: OwlVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(OwlVisionLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class OwlVisionModel(PreTrainedModel):
    config_class = OwlVisionConfig
    config: OwlVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    base_model_prefix = "vision_model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OwlVisionLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: OwlVisionConfig):
        super().__init__(config)
        self.embeddings = OwlVisionEmbeddings(config)
        self.encoder = OwlVisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OwlVisionEmbeddings):
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            # Of the patches' own order of size after the first norm: from 0.02 a small ViT takes minutes to notice
            # where things are. Released weights replace it.
            init.trunc_normal_(module.position_embedding, std=0.5)

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutput:
        hidden = self.encoder(self.embeddings(pixel_values))
        return BaseModelOutput(last_hidden_state=self.post_layernorm(hidden))


def flatten_features(hidden: torch.Tensor) -> torch.Tensor:
    """[N, P, D] as it is; a feature map [N, D, h, w] row by row → [N, h·w, D]."""
    return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden
