"""The visual knowledge module: pictures → features.

    pixel_values [N, 3, H, W] → [N, P, Dv]        N pictures, or frames; P = (H / patch)² + 1 with the class token

`OwlVisionModel` is mPLUG-Owl's ViT with the released weights' layout: one fused ``query_key_value`` whose rows
are ordered [head, (q, k, v), head_dim] (Megatron's order), a position table of fixed length, and the last norm on
*all* tokens. Any transformers vision backbone can take its place; `look` brings what it gives into the same shape.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
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


POSITION_GRID = 16
"""Side of the position table where there is no class token."""


class OwlVisionEmbeddings(nn.Module):
    def __init__(self, config: OwlVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.image_size = config.image_size
        self.grid = config.image_size // config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.use_cls_token else None
        table = (1, config.tokens, width) if config.use_cls_token else (POSITION_GRID**2, width)
        self.position_embedding = nn.Parameter(torch.zeros(table))
        self.patch_embed = nn.Conv2d(3, width, kernel_size=config.patch_size, stride=config.patch_size, bias=False)
        self.pre_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"pictures are {tuple(pixel_values.shape[-2:])}, the model takes {self.image_size} px")
        patches = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype)).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            patches = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return self.pre_layernorm(patches + self.positions())

    def positions(self) -> torch.Tensor:
        """[1, P, Dv]. The table without a class token is resized to the picture's grid, in fp32."""
        table = self.position_embedding
        if self.cls_token is not None or self.grid == POSITION_GRID:
            return table
        square = table.float().T.unflatten(1, (POSITION_GRID, POSITION_GRID)).unsqueeze(0)  # [1, Dv, 16, 16]
        resized = nn.functional.interpolate(square, size=(self.grid, self.grid), mode="bicubic", align_corners=False)
        return resized.flatten(2).transpose(1, 2).to(table.dtype)


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
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden)))


class OwlVisionTemporal(nn.Module):
    """The video variant's convolution over time: frames [M·T, P, D] → what is added to them, same shape.

    The class token is returned as it came, so that adding doubles it in every layer; the released weights were
    trained so.
    """

    def __init__(self, config: OwlVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.ln = nn.LayerNorm(width)
        self.down_proj = nn.Conv3d(width, width // 2, kernel_size=1)
        self.conv = nn.Conv3d(width // 2, width // 2, kernel_size=(3, 1, 1), padding=(1, 0, 0), groups=width // 2)
        self.up_proj = nn.Conv3d(width // 2, width, kernel_size=1)
        self.activation = ACT2FN["quick_gelu"]

    def forward(self, hidden: torch.Tensor, frames: int) -> torch.Tensor:
        first, patches = hidden[:, :1], self.ln(hidden[:, 1:])
        volume = patches.unflatten(0, (-1, frames)).permute(0, 3, 1, 2).unsqueeze(-1)  # [M, D, T, P, 1]
        volume = self.up_proj(self.activation(self.conv(self.down_proj(volume))))
        return torch.cat([first, volume.squeeze(-1).permute(0, 2, 3, 1).flatten(0, 1)], dim=1)


class OwlVisionLayer(GradientCheckpointingLayer):
    """A pre-norm block. The norms carry LLaMA's names in the released weights, but are LayerNorms."""

    def __init__(self, config: OwlVisionConfig):
        super().__init__()
        self.self_attn = OwlVisionAttention(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = OwlVisionMLP(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.temporal = OwlVisionTemporal(config) if config.temporal else None

    def forward(self, hidden: torch.Tensor, frames: int = 1) -> torch.Tensor:
        if self.temporal is not None and frames > 1:
            hidden = hidden + self.temporal(hidden, frames)
        hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class OwlVisionEncoder(nn.Module):
    def __init__(self, config: OwlVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(OwlVisionLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: torch.Tensor, frames: int = 1) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden, frames)
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
        norm = config.use_post_layernorm
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if norm else nn.Identity()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OwlVisionEmbeddings):
            if module.cls_token is not None:
                init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            # Of the patches' own order of size after the first norm: from 0.02 a small ViT takes minutes to notice
            # where things are. Released weights replace it.
            init.trunc_normal_(module.position_embedding, std=0.5)
        elif isinstance(module, OwlVisionTemporal):
            init.zeros_(module.up_proj.weight)
            init.zeros_(module.up_proj.bias)

    def forward(self, pixel_values: torch.Tensor, frames: int = 1, **kwargs) -> BaseModelOutput:
        """``frames`` consecutive rows are one video; 1 for pictures."""
        hidden = self.encoder(self.embeddings(pixel_values), frames)
        return BaseModelOutput(last_hidden_state=self.post_layernorm(hidden))


def look(backbone: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """[N, 3, H, W] → [N, P, Dv] by any backbone; a CNN's feature map [N, Dv, h, w] is read row by row."""
    if backbone.config.model_type == "siglip2_vision_model":  # takes patches and their grid instead of pixels
        side = backbone.config.patch_size
        patches = pixel_values.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [N, 3, h, side, w, side]
        patches = patches.permute(0, 2, 4, 3, 5, 1)
        shape = torch.tensor(patches.shape[1:3], device=patches.device).expand(len(patches), 2)
        patches = patches.flatten(3).flatten(1, 2)  # [N, h·w, side·side·3]
        there = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
        hidden = backbone(patches, pixel_attention_mask=there, spatial_shapes=shape).last_hidden_state
    else:
        hidden = backbone(pixel_values=pixel_values).last_hidden_state
    return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden
