"""Configuration of an Owl: three modules that plug together (mPLUG-Owl, arXiv 2304.14178, figure 2).

``vision_config`` is the visual knowledge module (the Owl ViT, or any transformers vision backbone),
``abstractor_config`` the visual abstractor, ``text_config`` any decoder-only causal language model.
Widths are checked here, when the configuration is built, and refused with both numbers.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, LlamaConfig, PretrainedConfig


class OwlVisionConfig(PretrainedConfig):
    """The Owl ViT: CLIP ViT-L/14's shape by default (303 M parameters)."""

    model_type = "owl_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        require_divisible(self, "hidden_size", "num_attention_heads")
        require_divisible(self, "image_size", "patch_size")


class OwlAbstractorConfig(PretrainedConfig):
    """The visual abstractor: ``num_queries`` learned queries read the picture's features.

    ``encoder_hidden_size`` is the width of the visual features. In the released models it equals
    ``hidden_size``; where a backbone is wider or narrower, one linear projection comes first.
    """

    model_type = "owl_abstractor"
    base_config_key = "abstractor_config"

    hidden_size: int = 1024
    encoder_hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    num_queries: int = 64
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        require_divisible(self, "hidden_size", "num_attention_heads")


class OwlConfig(PretrainedConfig):
    """An Owl. ``image_token_id`` stands once in the token ids for each visual token of a picture;
    it may lie outside the vocabulary, as it is never looked up in the embedding table."""

    model_type = "owl"
    sub_configs = {
        "vision_config": AutoConfig,
        "abstractor_config": OwlAbstractorConfig,
        "text_config": AutoConfig,
    }

    vision_config: Any = None
    abstractor_config: Any = None
    text_config: Any = None
    image_token_id: Any = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.vision_config = as_config(self.vision_config, OwlVisionConfig)
        self.abstractor_config = as_config(self.abstractor_config, OwlAbstractorConfig)
        self.text_config = as_config(self.text_config, LlamaConfig)
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        if self.image_token_id is None:
            self.image_token_id = self.text_config.vocab_size
        super().__post_init__(**kwargs)
        seen, wanted = vision_width(self.vision_config), self.abstractor_config.encoder_hidden_size
        if seen != wanted:
            raise ValueError(
                f"the vision backbone gives features of width {seen}, but abstractor_config.encoder_hidden_size "
                f"is {wanted}: they must agree"
            )

    @property
    def visual_tokens(self) -> int:
        """Tokens that one picture takes in the language model: the queries and the closing vit_eos."""
        return self.abstractor_config.num_queries + 1


def vision_width(config: PretrainedConfig) -> int:
    """Width of the last features of a vision backbone, transformer or CNN."""
    if config.model_type == "mobilenet_v2":  # its config states multipliers, not the final width
        return (
            1280 if config.finegrained_output or config.depth_multiplier <= 1 else int(1280 * config.depth_multiplier)
        )
    if hidden_sizes := getattr(config, "hidden_sizes", None):
        return hidden_sizes[-1]
    return config.hidden_size


def as_config(value, default: type[PretrainedConfig]) -> PretrainedConfig:
    if isinstance(value, PretrainedConfig):
        return value
    if value is None:
        return default()
    if value.get("model_type", default.model_type) == default.model_type:
        return default(**{k: v for k, v in value.items() if k != "model_type"})
    return AutoConfig.for_model(**value)


def require_divisible(config: PretrainedConfig, whole: str, part: str) -> None:
    if getattr(config, whole) % getattr(config, part):
        raise ValueError(f"{whole} {getattr(config, whole)} is not a multiple of {part} {getattr(config, part)}")
