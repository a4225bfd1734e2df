"""The Owl: embed the words, put the pictures in their places, decode.

    input_ids           [B, L]            with ``image_token_id`` (``video_token_id``) once for each visual token
    pixel_values        [N, 3, H, W]      all pictures of the batch, in reading order
    pixel_values_videos [M, T, 3, H, W]   all videos of the batch, likewise
    → logits [B, L, V], or with labels a loss

Follows transformers' conventions for multimodal models (`get_image_features`, `mm_encoder_outputs`), so that
`generate` encodes each picture once, and PEFT and serving engines find what they look for.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from owl_model import official, packed
from owl_model.abstractor import OwlAbstractor
from owl_model.adaptive import make_adaptive, sort_rows
from owl_model.config import OwlAbstractorConfig, OwlConfig, OwlVisionConfig, vision_width
from owl_model.vision import OwlVisionModel, look


class OwlPreTrainedModel(PreTrainedModel):
    config_class = OwlConfig
    config: OwlConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class OwlModel(OwlPreTrainedModel):
    """Vision encoder, visual abstractor and language model, without the head."""

    def __init__(self, config: OwlConfig):
        super().__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config)
        self.abstractor = OwlAbstractor(config.abstractor_config, config.text_config.hidden_size)
        self.language_model = AutoModel.from_config(config.text_config)
        # BLOOM norms its embeddings. mPLUG-Owl norms those of words alone, so the norm stands before the pictures
        # are placed and not behind.
        self.embedding_norm = getattr(self.language_model, "word_embeddings_layernorm", nn.Identity())
        if config.text_config.model_type == "bloom":
            self.language_model.word_embeddings_layernorm = nn.Identity()
        if config.modality_adaptive:
            make_adaptive(self.language_model, config.adaptive_modules)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] → [N, P, Dv]: what a frozen encoder may compute once for all epochs."""
        return look(self.vision_model, pixel_values)

    def get_image_features(
        self, pixel_values: torch.Tensor | None = None, vision_features: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Pictures → ``pooler_output`` [N, Q + 1, Dt], ready to stand among the words."""
        if vision_features is None:
            if pixel_values is None:
                raise ValueError("give pixel_values or vision_features")
            vision_features = self.get_vision_features(pixel_values)
        features: torch.Tensor = vision_features
        tokens = self.abstractor(features.to(self.abstractor.query_tokens.dtype))
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=tokens)

    def get_video_features(self, pixel_values_videos: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Videos [M, T, 3, H, W] → ``pooler_output`` [M, Q + 1, Dt], ready to stand among the words."""
        videos, frames = pixel_values_videos.shape[:2]
        if frames > 1 and not self.config.abstractor_config.temporal:
            raise ValueError(f"videos of {frames} frames need a model with temporal modules; this one reads pictures")
        features = self.vision_model(pixel_values=pixel_values_videos.flatten(0, 1), frames=frames).last_hidden_state
        features = features.unflatten(0, (videos, frames))  # [M, T, P, Dv]
        tokens = self.abstractor(features.flatten(1, 2).to(self.abstractor.query_tokens.dtype), frames)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=tokens)

    def place(self, embeds: torch.Tensor, is_there: torch.Tensor, tokens: torch.Tensor | None, name: str):
        """Word embeddings [B, L, Dt] with visual tokens [N, Q + 1, Dt] in the rows that ``is_there`` marks."""
        places = int(is_there.sum())
        found = 0 if tokens is None else tokens.shape[0] * tokens.shape[1]
        if places != found:
            each = self.config.visual_tokens
            raise ValueError(
                f"the text has {places} {name} placeholders ({places / each:g} {name}s of {each}), "
                f"but {found} visual tokens ({found // each} {name}s) were given"
            )
        return embeds if tokens is None else embeds.masked_scatter(is_there.unsqueeze(-1), tokens.to(embeds.dtype))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        look_only: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """``look_only``, pixels [1, 3, H, W] or features [1, P, D], is seen and stands nowhere."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            given = mm_encoder_outputs or {}
            images, videos = given.get("image"), given.get("video")
            if images is None and (pixel_values is not None or vision_features is not None):
                images = self.get_image_features(pixel_values, vision_features)
            if videos is None and pixel_values_videos is not None:
                videos = self.get_video_features(pixel_values_videos)
            is_image, is_video = input_ids == self.config.image_token_id, input_ids == self.config.video_token_id
            is_visual = is_image | is_video
            inputs_embeds = self.embedding_norm(self.get_input_embeddings()(input_ids.masked_fill(is_visual, 0)))
            inputs_embeds = self.place(inputs_embeds, is_image, images and images.pooler_output, "image")
            inputs_embeds = self.place(inputs_embeds, is_video, videos and videos.pooler_output, "video")
            if look_only is not None:
                pixels, features = (look_only, None) if look_only.ndim == 4 else (None, look_only)
                seen = self.get_image_features(pixels, features).pooler_output
                inputs_embeds = inputs_embeds + 0.0 * seen.sum().to(inputs_embeds.dtype)
            if self.training and (idle := self.idle_parameters(images is not None, videos is not None)):
                inputs_embeds = inputs_embeds + sum(p.flatten()[0] * 0.0 for p in idle)
            if self.config.modality_adaptive:
                kwargs["rows"] = sort_rows(is_visual)
        elif self.config.modality_adaptive and "rows" not in kwargs:
            raise ValueError("a modality-adaptive model needs input_ids or rows, to know which rows are visual")
        kwargs.pop("return_dict", None)
        if position_ids is not None and self.language_model.config._attn_implementation == packed.NAME:
            kwargs |= packed.cuts_of(position_ids)
        return self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def idle_parameters(self, images: bool, videos: bool) -> list[nn.Parameter]:
        """What trains but is not touched by a batch without pictures or videos. With zero gradients instead of none,
        data-parallel ranks that hold pictures do not wait for those that hold none. Ranks that shard their weights must
        gather them together, and give ``look_only`` instead."""
        seeing = {**named(self.vision_model), **named(self.abstractor)}
        if videos:
            idle = {}
        elif images:
            idle = {name: p for name, p in seeing.items() if "temporal" in name}
        else:
            idle = seeing | {name: p for name, p in named(self.language_model).items() if ".multiway.1." in name}
        return [p for p in idle.values() if p.requires_grad and not isinstance(p, DTensor)]


def named(module: nn.Module) -> dict[str, nn.Parameter]:
    return {f"{type(module).__name__}.{name}": p for name, p in module.named_parameters()}


LOSS_ROWS = 1024
"""Supervised tokens whose logits are held at once: 131 MB in fp32 for 32,000 words."""

BIASED_HEADS = ("codegen", "gptj", "phi")
"""Language models whose head has a bias, which their configuration does not tell."""


@dataclass
class OwlOutput(CausalLMOutputWithPast):
    token_losses: torch.Tensor | None = None
    """[T] of the supervised tokens in reading order, for the log: no gradient passes through them."""


class OwlForConditionalGeneration(OwlPreTrainedModel, GenerationMixin):
    """An Owl with its head. ``from_pretrained`` also opens the authors' folders (owl_model/official.py)."""

    def __init__(self, config: OwlConfig):
        super().__init__(config)
        self.model = OwlModel(config)
        words = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is words)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=text.model_type in BIASED_HEADS)
        self.post_init()

    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        """As of transformers; a folder of the authors' (mplug-owl, mplug_owl2) is read under their names, LoRA merged
        where it is not."""
        config = kwargs.pop("config", None) or OwlConfig.from_pretrained(folder)
        if theirs := official.family(config.official):
            if weights := official.rewritten(folder, theirs):
                return super().from_pretrained(None, *args, config=config, state_dict=weights, **kwargs)
            kwargs["key_mapping"] = {**official.patterns(theirs), **kwargs.get("key_mapping", {})}
        return super().from_pretrained(folder, *args, config=config, **kwargs)

    def save_pretrained(self, folder, **kwargs):
        """As of transformers, under our names; `conversion.write_official` writes the authors'."""
        super().save_pretrained(folder, **{"save_original_format": False, **kwargs})

    @classmethod
    def from_parts(
        cls,
        vision: str | Path | PretrainedConfig | PreTrainedModel,
        language_model: str | Path,
        abstractor: OwlAbstractorConfig,
        adaptive_modules: Collection[str] = (),
    ) -> OwlForConditionalGeneration:
        """A new Owl from foundation parts: a vision backbone (its folder, the model itself, or a configuration for a
        fresh one), a causal language model's folder, and a fresh abstractor. The visual copies of
        ``adaptive_modules`` start equal to the textual ones. Raises ValueError for a language model whose logits
        Owl would not reproduce."""
        text = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32).eval()
        ids = torch.arange(min(16, text.config.vocab_size)).unsqueeze(0)
        with torch.no_grad():
            wanted = text(input_ids=ids)
        if "past_key_values" not in wanted:
            raise ValueError(f"{text.config.model_type} keeps no past_key_values: it is no decoder of attention layers")
        if isinstance(vision, PreTrainedModel):
            tower = vision
        elif isinstance(vision, PretrainedConfig):
            tower = AutoModel.from_config(vision)
        else:
            settings = AutoConfig.from_pretrained(vision)
            settings = getattr(settings, "vision_config", settings)  # of a model with a text tower beside it
            tower = AutoModel.from_pretrained(vision, config=settings, dtype=torch.float32)
        abstractor.encoder_hidden_size = vision_width(tower.config)
        config = OwlConfig(
            vision_config=tower.config,
            abstractor_config=abstractor,
            text_config=text.config,
            adaptive_modules=list(adaptive_modules),
        )
        owl = cls(config)
        owl.model.vision_model.load_state_dict(tower.state_dict())
        weights = {f"model.language_model.{name}": value for name, value in text.base_model.state_dict().items()}
        norm = "model.language_model.word_embeddings_layernorm."
        weights = {name.replace(norm, "model.embedding_norm."): value for name, value in weights.items()}
        for name, value in list(weights.items()):
            for part in adaptive_modules:
                if f".{part}." in name:
                    del weights[name]
                    weights |= {name.replace(f".{part}.", f".{part}.multiway.{way}."): value for way in (0, 1)}
        weights |= {f"lm_head.{name}": value for name, value in text.get_output_embeddings().state_dict().items()}
        missing, left_over = owl.load_state_dict(weights, strict=False)
        missing = [name for name in missing if name.startswith(("model.language_model.", "model.embedding", "lm_head"))]
        if missing or left_over:
            raise ValueError(f"{text.config.model_type} does not fit: missing {missing}, left over {left_over}")
        owl.generation_config = text.generation_config
        with torch.no_grad():
            apart = (owl.eval()(input_ids=ids).logits - wanted.logits).abs().max().item()
        if not apart < 1e-3:
            raise ValueError(
                f"{text.config.model_type} does something to its logits that Owl does not: they differ by {apart:.3g}"
            )
        return owl.train()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor | None = None, **kwargs) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_video_features(self, pixel_values_videos: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        return self.model.get_video_features(pixel_values_videos, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        **kwargs,
    ) -> OwlOutput:
        """With ``labels`` [B, L] (-100 = not supervised): the loss, summed over the supervised tokens and divided by
        ``num_items_in_batch`` (by their count here, if it is not given). Only the supervised rows meet the head, so
        no logits are returned then, nor keys and values kept; a batch with nothing supervised has the loss zero."""
        if labels is not None:
            kwargs.setdefault("use_cache", False)  # beside a cache, transformers overlooks that samples are packed
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            vision_features=vision_features,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if labels is not None:
            targets = labels[:, 1:]
            supervised = targets != -100
            losses = self.token_losses(hidden[:, :-1][supervised], targets[supervised])
            count = supervised.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            kept = {"past_key_values": outputs.past_key_values, "token_losses": losses.detach()}
            return OwlOutput(loss=losses.sum() / count, **kept)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return OwlOutput(logits=self.logits(hidden[:, keep]), past_key_values=outputs.past_key_values)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[…, Dt] → [… , V], scaled and capped where the language model's family does so after its head."""
        text = self.config.text_config
        logits = self.lm_head(hidden)
        if text.model_type.startswith("cohere"):
            logits = logits * text.logit_scale
        elif text.model_type.startswith("granite"):
            logits = logits / text.logits_scaling
        if cap := getattr(text, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    def token_losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """[T] cross-entropies of [T, Dt] against [T]. Never more than LOSS_ROWS rows of logits exist at once: with
        more, each piece is computed again in the backward pass."""

        def piece(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(self.logits(hidden).float(), targets, reduction="none")

        if len(targets) <= LOSS_ROWS:
            return piece(hidden, targets)
        pieces = zip(hidden.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True)
        return torch.cat([checkpoint(piece, *rows, use_reentrant=False) for rows in pieces])


AutoConfig.register("owl", OwlConfig, exist_ok=True)
AutoConfig.register("owl_vision", OwlVisionConfig, exist_ok=True)
AutoModel.register(OwlVisionConfig, OwlVisionModel, exist_ok=True)
AutoModel.register(OwlConfig, OwlModel, exist_ok=True)
AutoModelForImageTextToText.register(OwlConfig, OwlForConditionalGeneration, exist_ok=True)
