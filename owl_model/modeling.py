"""The Owl: embed the words, put the pictures in their places, decode.

    input_ids    [B, L]         with ``image_token_id`` once for each visual token
    pixel_values [N, 3, H, W]   all pictures of the batch, in reading order
    → logits [B, L, V], or with labels a loss

Follows transformers' conventions for multimodal models (`get_image_features`, `mm_encoder_outputs`), so that
`generate` encodes each picture once, and PEFT and serving engines find what they look for.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from owl_model.abstractor import OwlAbstractor
from owl_model.config import OwlAbstractorConfig, OwlConfig, OwlVisionConfig, vision_width
from owl_model.vision import OwlVisionModel, flatten_features


class OwlPreTrainedModel(PreTrainedModel):
    config_class = OwlConfig
    config: OwlConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
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
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] → [N, P, Dv]: what a frozen encoder may compute once for all epochs."""
        return flatten_features(self.vision_model(pixel_values=pixel_values).last_hidden_state)

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

    def place_images(self, input_ids: torch.Tensor, image_tokens: torch.Tensor | None) -> torch.Tensor:
        """Word embeddings [B, L, Dt] with the visual tokens [N, Q + 1, Dt] in the placeholders' rows."""
        is_image = input_ids == self.config.image_token_id
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        places = int(is_image.sum())
        found = 0 if image_tokens is None else image_tokens.shape[0] * image_tokens.shape[1]
        if places != found:
            per_image = self.config.visual_tokens
            raise ValueError(
                f"the text has {places} image placeholders ({places / per_image:g} pictures of {per_image}), "
                f"but {found} visual tokens ({found // per_image} pictures) were given"
            )
        if image_tokens is not None:
            embeds = embeds.masked_scatter(is_image.unsqueeze(-1), image_tokens.to(embeds.dtype))
        return embeds

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            image_outputs = (mm_encoder_outputs or {}).get("image")
            if image_outputs is None and (pixel_values is not None or vision_features is not None):
                image_outputs = self.get_image_features(pixel_values, vision_features)
            image_tokens = None if image_outputs is None else image_outputs.pooler_output
            inputs_embeds = self.place_images(input_ids, image_tokens)
            if self.training and image_tokens is None:
                inputs_embeds = inputs_embeds + self.untouched_modules()
        kwargs.pop("return_dict", None)
        return self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def untouched_modules(self) -> torch.Tensor:
        """Zero, with a gradient path to the trainable visual parameters: a batch of text alone then gives them zero
        gradients instead of none, and data-parallel ranks that hold pictures do not wait for it."""
        modules = [*self.vision_model.parameters(), *self.abstractor.parameters()]
        return sum((p.flatten()[0] * 0.0 for p in modules if p.requires_grad), start=torch.zeros(()))


class OwlForConditionalGeneration(OwlPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: OwlConfig):
        super().__init__(config)
        self.model = OwlModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_parts(
        cls,
        vision: str | Path | OwlPreTrainedModel,
        language_model: str | Path,
        abstractor: OwlAbstractorConfig,
    ) -> OwlForConditionalGeneration:
        """A new Owl from foundation parts: a vision backbone's folder (or a configuration, for a fresh one), a
        causal language model's folder, and a fresh abstractor."""
        text = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32)
        fresh = not isinstance(vision, (str, Path))
        tower = AutoModel.from_config(vision) if fresh else AutoModel.from_pretrained(vision, dtype=torch.float32)
        abstractor.encoder_hidden_size = vision_width(tower.config)
        config = OwlConfig(vision_config=tower.config, abstractor_config=abstractor, text_config=text.config)
        owl = cls(config)
        owl.model.vision_model.load_state_dict(tower.state_dict())
        owl.model.language_model.load_state_dict(text.base_model.state_dict())
        owl.lm_head.load_state_dict(text.get_output_embeddings().state_dict())
        owl.generation_config = text.generation_config
        return owl

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor | None = None, **kwargs) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(pixel_values, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
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
    ) -> CausalLMOutputWithPast:
        """With ``labels`` [B, L] (-100 = not supervised): the loss, summed over the supervised tokens and divided by
        ``num_items_in_batch`` (by their count here, if it is not given). Only the supervised rows meet the head, so
        no logits are returned then; a batch with nothing supervised has the loss zero."""
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
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
            logits = self.lm_head(hidden[:, :-1][supervised]).float()  # [T, V], T supervised tokens
            total = nn.functional.cross_entropy(logits, targets[supervised], reduction="sum")
            count = supervised.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            return CausalLMOutputWithPast(loss=total / count, past_key_values=outputs.past_key_values)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(logits=self.lm_head(hidden[:, keep]), past_key_values=outputs.past_key_values)


AutoConfig.register("owl", OwlConfig, exist_ok=True)
AutoConfig.register("owl_vision", OwlVisionConfig, exist_ok=True)
AutoModel.register(OwlVisionConfig, OwlVisionModel, exist_ok=True)
AutoModel.register(OwlConfig, OwlModel, exist_ok=True)
AutoModelForImageTextToText.register(OwlConfig, OwlForConditionalGeneration, exist_ok=True)
