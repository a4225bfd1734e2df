"""The visual abstractor: a picture's features → a fixed number of tokens of the language model.

    features [N, P, Dv] → [N, Q + 1, Dt]        Q learned queries, then one learned ``vit_eos``

mPLUG-Owl (arXiv 2304.14178), section 3.1, with the released weights' particulars: keys and values are the queries
*and* the picture; the residual is taken from the *normed* queries; the feed-forward part is SwiGLU with a LayerNorm
before its last matrix; norms use torch's epsilon, 1e-5, but for that one.
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

    def forward(self, queries: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [N, heads, L, d]

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        query, key, value = heads(self.query(queries)), heads(self.key(memory)), heads(self.value(memory))
        dropout = self.config.attention_dropout if self.training else 0.0
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
        self.vit_eos = nn.Parameter(torch.zeros(1, 1, text_width))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OwlAbstractor):
            # The released code starts every query at zero, which leaves them identical for ever without positions.
            init.trunc_normal_(module.query_tokens, std=1.0)
            init.trunc_normal_(module.vit_eos, std=self.config.initializer_range)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = self.feature_proj(features)
        queries = self.encoder(self.query_tokens.expand(len(features), -1, -1), features)
        tokens = self.visual_fc(queries)
        return torch.cat([tokens, self.vit_eos.expand(len(tokens), -1, -1)], dim=1)
