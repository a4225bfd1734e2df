"""The visual abstractor: a picture's features → a fixed number of tokens of the language model.

    features [N, T·P, Dv] → [N, Q + 1, Dt]      Q learned queries, then one learned ``vit_eos``; T frames of a video

mPLUG-Owl (arXiv 2304.14178), section 3.1, with the released weights' particulars: keys and values are the queries
*and* the picture; the residual is taken from the *normed* queries; the feed-forward part is SwiGLU with a LayerNorm
before its last matrix; norms use torch's epsilon, 1e-5, but for that one. mPLUG-Owl2 (arXiv 2311.04257) adds
sine-cosine positions to queries and keys, not to values nor to the residual. The video variant reads with Q further
queries, which have a projection of their own.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from owl_model.config import OwlAbstractorConfig
from owl_model.vision import eager_attention


class AbstractorMLP(nn.Module):
    def __init__(self, config: OwlAbstractorConfig):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_ln = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.w2(self.ffn_ln(nn.functional.silu(self.w1(hidden)) * self.w3(hidden)))


class AbstractorAttention(nn.Module):
    def __init__(self, config: OwlAbstractorConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.is_causal = False
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        if config.grid_size:  # kept in the weights, as the released files do
            self.register_buffer("q_pos_embed", torch.zeros(config.num_queries, config.hidden_size))
            self.register_buffer("k_pos_embed", torch.zeros(config.positions, config.hidden_size))

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [N, heads, L, d]

    def asked(self, queries: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, by heads."""
        if self.config.grid_size:
            queries = queries + self.q_pos_embed
            memory = memory + torch.cat([self.q_pos_embed, self.k_pos_embed])
        return self.heads(self.query(queries)), self.heads(self.key(memory))

    def weights(self, queries: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """[N, heads, Q, Q + P]: what each query takes of each place."""
        query, key = self.asked(queries, memory)
        return (query @ key.transpose(-1, -2) * self.head_dim**-0.5).softmax(-1)

    def forward(self, queries: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        query, key = self.asked(queries, memory)
        dropout = self.config.attention_dropout if self.training else 0.0
        value = self.heads(self.value(memory))
        out, _ = attend(self, query, key, value, None, scaling=self.head_dim**-0.5, dropout=dropout)
        return out.flatten(2)


class AbstractorOutput(nn.Module):
    def __init__(self, config: OwlAbstractorConfig):
        super().__init__()
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size)
        self.mlp = AbstractorMLP(config)

    def forward(self, normed_queries: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        hidden = normed_queries + self.out_proj(attended)
        return hidden + self.mlp(self.norm2(hidden))


class AbstractorCrossAttention(nn.Module):
    def __init__(self, config: OwlAbstractorConfig):
        super().__init__()
        self.attention = AbstractorAttention(config)
        self.output = AbstractorOutput(config)
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.normk = nn.LayerNorm(config.hidden_size)

    def forward(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        queries = self.norm1(queries)
        memory = torch.cat([queries, self.normk(features)], dim=1)  # [N, Q + P, D]
        return self.output(queries, self.attention(queries, memory))


class AbstractorLayer(GradientCheckpointingLayer):
    def __init__(self, config: OwlAbstractorConfig):
        super().__init__()
        self.crossattention = AbstractorCrossAttention(config)

    def forward(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.crossattention(queries, features)


class AbstractorEncoder(nn.Module):
    def __init__(self, config: OwlAbstractorConfig):
        super().__init__()
        self.layers = nn.ModuleList(AbstractorLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            queries = layer(queries, features)
        return queries


class OwlAbstractor(PreTrainedModel):
    config_class = OwlAbstractorConfig
    config: OwlAbstractorConfig
    base_model_prefix = "abstractor"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AbstractorLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: OwlAbstractorConfig, text_width: int):
        super().__init__(config)
        same = config.encoder_hidden_size == config.hidden_size
        self.feature_proj = nn.Identity() if same else nn.Linear(config.encoder_hidden_size, config.hidden_size)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_queries, config.hidden_size))
        self.encoder = AbstractorEncoder(config)
        self.visual_fc = nn.Linear(config.hidden_size, text_width)
        if config.temporal:
            self.temporal_query_tokens = nn.Parameter(torch.zeros_like(self.query_tokens))
            self.temporal_visual_fc = nn.Linear(config.hidden_size, text_width)
        self.vit_eos = nn.Parameter(torch.zeros(1, 1, text_width))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OwlAbstractor):
            # The released code starts every query at zero, which leaves them identical for ever without positions.
            init.trunc_normal_(module.query_tokens, std=1.0)
            init.trunc_normal_(module.vit_eos, std=self.config.initializer_range)
            if self.config.temporal:
                init.trunc_normal_(module.temporal_query_tokens, std=1.0)
        elif isinstance(module, AbstractorAttention) and self.config.grid_size:
            width, grid = self.config.hidden_size, self.config.grid_size
            init.copy_(module.q_pos_embed, sine_cosine(torch.arange(self.config.num_queries), width))
            init.copy_(module.k_pos_embed, grid_positions(width, grid, self.config.use_cls_token))

    def forward(self, features: torch.Tensor, frames: int = 1) -> torch.Tensor:
        video = self.config.temporal and frames > 1
        start = torch.cat([self.query_tokens, self.temporal_query_tokens], 1) if video else self.query_tokens
        queries = self.encoder(start.expand(len(features), -1, -1), self.feature_proj(features))
        if video:
            still, moving = queries.chunk(2, dim=1)
            tokens = self.visual_fc(still) + self.temporal_visual_fc(moving)
        else:
            tokens = self.visual_fc(queries)
        return torch.cat([tokens, self.vit_eos.expand(len(tokens), -1, -1)], dim=1)


def sine_cosine(places: torch.Tensor, width: int) -> torch.Tensor:
    """[n] places → [n, width]: sines, then cosines, of place · 10000^(-2i / width)."""
    rates = 1.0 / 10000 ** (torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = places.flatten().double()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def grid_positions(width: int, grid: int, cls_token: bool) -> torch.Tensor:
    """[grid², width], row by row: the column in the first half of the channels, the row in the second (MAE's order);
    a row of zeros in front for the class token."""
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    table = torch.cat([sine_cosine(columns, width // 2), sine_cosine(rows, width // 2)], dim=1)
    return torch.cat([torch.zeros(1, width), table]) if cls_token else table
