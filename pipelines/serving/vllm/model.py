"""Owl on vLLM's backend for transformers' models: its decoder with vLLM's attention and fused layers, pictures placed
as everywhere (owl_model/modeling.py), mPLUG-Owl2's rows told apart by their token ids.

Our gateway hands over prompts whose pictures are placed and pixels that are prepared (engine.py). vLLM's own server, a
rival to measure against, puts pictures before the words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import BatchFeature
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.model_executor.models.transformers.base import Base
from vllm.model_executor.models.utils import _merge_multimodal_embeddings
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptIndexTargets,
    PromptInsertion,
)

from owl_model import OwlProcessor


class Info(BaseProcessingInfo):
    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.get_hf_config().visual_tokens}

    @cached_property
    def owl(self) -> OwlProcessor:
        return OwlProcessor.from_pretrained(self.model_id)


class Blank(BaseDummyInputsBuilder[Info]):
    """What vLLM measures its memory with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> Any:
        side = self.info.owl.image_processor.image_size
        return {"image": self._get_dummy_images(width=side, height=side, num_images=mm_counts.get("image", 0))}


class Pictures(BaseMultiModalProcessor[Info]):
    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        return self.info.owl.image_processor(list(hf_data["images"]))

    def _get_mm_fields_config(self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]):
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs) -> Sequence[PromptInsertion]:
        config = self.info.get_hf_config()
        run = [config.image_token_id] * config.visual_tokens
        return [PromptInsertion(modality="image", target=PromptIndexTargets.start(), insertion=run)]


@MULTIMODAL_REGISTRY.register_processor(Pictures, info=Info, dummy_inputs=Blank)
class OwlForVllm(TransformersMultiModalForCausalLM):
    requires_raw_input_tokens = True

    def embed_multimodal(self, pixel_values: torch.Tensor | None = None, **kwargs: object) -> Iterable[torch.Tensor]:
        """[N, 3, S, S] → N of [Q + 1, D]"""
        if pixel_values is None:
            return []
        return list(self.model.get_image_features(pixel_values).pooler_output)

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As owl_model does; a picture's placeholder has no word of its own."""
        words = input_ids.masked_fill(input_ids >= self.text_config.vocab_size, 0)
        embeds = self.model.embedding_norm(self.model.get_input_embeddings()(words))
        if multimodal_embeddings is None or not len(multimodal_embeddings):
            return embeds
        return _merge_multimodal_embeddings(embeds, multimodal_embeddings, is_multimodal)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        rows = {}
        if self.config.modality_adaptive:
            assert input_ids is not None
            visual = (input_ids == self.config.image_token_id)[None, :, None]
            rows["rows"] = visual if visual.any() else None
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        return Base.forward(self, None, positions, intermediate_tensors, inputs_embeds, **rows)

    def _decorate_for_torch_compile(self) -> None:
        """vLLM compiles decoders by the names of their arguments, among which are no rows."""
        if not self.config.modality_adaptive:
            super()._decorate_for_torch_compile()
