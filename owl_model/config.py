"""Configuration of an Owl: three modules that plug together (mPLUG-Owl, arXiv 2304.14178, figure 2).

``vision_config`` is the visual knowledge module (the Owl ViT, or any transformers vision backbone),
``abstractor_config`` the visual abstractor, ``text_config`` any decoder-only causal language model.
Widths are checked here, when the configuration is built, and refused with both numbers.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from owl_model import official


class OwlVisionConfig(PretrainedConfig):
    """The Owl ViT: CLIP ViT-L/14's shape by default (303 M parameters).

    ``temporal`` adds the video variant's convolutions over time. Without ``use_cls_token`` the position table is a
    16×16 grid, resized to the picture's (mPLUG-Owl2's second variant).
    """

    model_type = "owl_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cls_token: bool = True
    use_post_layernorm: bool = True
    temporal: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        require_divisible(self, "hidden_size", "num_attention_heads")
        require_divisible(self, "image_size", "patch_size")

    @property
    def tokens(self) -> int:
        """Features of one picture: its patches, and the class token."""
        return (self.image_size // self.patch_size) ** 2 + self.use_cls_token


class OwlAbstractorConfig(PretrainedConfig):
    """The visual abstractor: ``num_queries`` learned queries read the picture's features.

    ``encoder_hidden_size`` is the width of the visual features. In the released models it equals
    ``hidden_size``; where a backbone is wider or narrower, one linear projection comes first. ``grid_size`` is
    mPLUG-Owl2's: sine-cosine positions for a grid of that many patches a side (0 = no positions, as in mPLUG-Owl),
    with a zero row for the class token if ``use_cls_token``. ``temporal`` adds the video variant's second queries.
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
    grid_size: int = 0
    use_cls_token: bool = True
    temporal: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        require_divisible(self, "hidden_size", "num_attention_heads")

    @property
    def positions(self) -> int:
        """How many features it has positions for; 0 without positions."""
        return self.grid_size**2 + self.use_cls_token if self.grid_size else 0


class OwlConfig(PretrainedConfig):
    """An Owl. ``image_token_id`` stands once in the token ids for each visual token of a picture, ``video_token_id``
    for each of a video; they may lie outside the vocabulary, as they are never looked up in the embedding table.
    ``adaptive_modules`` names the parts of a decoder layer that it keeps twice, for words and for visual tokens
    (mPLUG-Owl2's modality-adaptive module; empty = none). ``official`` is the authors' configuration that it came
    from, if it did."""

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
    video_token_id: Any = None
    adaptive_modules: Any = ()
    official: Any = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.vision_config = as_config(self.vision_config, OwlVisionConfig)
        self.abstractor_config = as_config(self.abstractor_config, OwlAbstractorConfig)
        self.text_config = as_config(self.text_config, LlamaConfig)
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        if self.image_token_id is None:
            self.image_token_id = self.text_config.vocab_size
        if self.video_token_id is None:
            self.video_token_id = self.image_token_id + 1
        super().__post_init__(**kwargs)
        seen, wanted = vision_width(self.vision_config), self.abstractor_config.encoder_hidden_size
        if seen != wanted:
            raise ValueError(
                f"the vision backbone gives features of width {seen}, but abstractor_config.encoder_hidden_size "
                f"is {wanted}: they must agree"
            )
        positions = self.abstractor_config.positions
        if positions and positions != self.vision_config.tokens:
            raise ValueError(
                f"the vision backbone gives {self.vision_config.tokens} features a picture, but the abstractor has "
                f"positions for {positions} (grid_size {self.abstractor_config.grid_size}): they must agree"
            )

    @classmethod
    def get_config_dict(cls, folder, **kwargs):
        """As of transformers; a configuration of the authors' is translated (owl_model/official.py)."""
        values, rest = super().get_config_dict(folder, **kwargs)
        return official.config_from_official(values, folder), rest

    @property
    def modality_adaptive(self) -> bool:
        return bool(self.adaptive_modules)

    @property
    def visual_tokens(self) -> int:
        """Tokens that one picture takes in the language model: the queries and the closing vit_eos."""
        return self.abstractor_config.num_queries + 1


def tiny() -> OwlConfig:
    """A million parameters, to try things with."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return OwlConfig(
        vision_config=OwlVisionConfig(**shape, image_size=56, patch_size=14),
        abstractor_config=OwlAbstractorConfig(**shape, encoder_hidden_size=64, num_queries=8),
        text_config=LlamaConfig(**shape, vocab_size=1000, max_position_embeddings=512),
    )


def owl1_7b() -> OwlConfig:
    """mPLUG-Owl with LLaMA 7B, as released: 7.12 billion parameters."""
    return OwlConfig(text_config=LlamaConfig())


def owl2_7b() -> OwlConfig:
    """mPLUG-Owl2 with LLaMA 2 7B, as released: 8.20 billion parameters."""
    return OwlConfig(
        vision_config=OwlVisionConfig(image_size=448),
        abstractor_config=OwlAbstractorConfig(grid_size=32),
        text_config=LlamaConfig(rms_norm_eps=1e-5, max_position_embeddings=4096),
        adaptive_modules=list(official.OWL2_ADAPTIVE),
    )


PRESETS = {"tiny": tiny, "owl1_7b": owl1_7b, "owl2_7b": owl2_7b}


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
