"""Owl: mPLUG-Owl as plain PyTorch on transformers. Pictures and words in, a loss or an answer out."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from owl_model.abstractor import OwlAbstractor
from owl_model.chat import Template
from owl_model.config import OwlAbstractorConfig, OwlConfig, OwlVisionConfig
from owl_model.images import ImageError, OwlImageProcessor, open_image
from owl_model.modeling import OwlForConditionalGeneration, OwlModel
from owl_model.processing import OwlProcessor
from owl_model.vision import OwlVisionModel

__all__ = [
    "ImageError",
    "OwlAbstractor",
    "OwlAbstractorConfig",
    "OwlConfig",
    "OwlForConditionalGeneration",
    "OwlImageProcessor",
    "OwlModel",
    "OwlProcessor",
    "OwlVisionConfig",
    "OwlVisionModel",
    "Template",
    "open_image",
]

AutoConfig.register("owl", OwlConfig, exist_ok=True)
AutoConfig.register("owl_vision", OwlVisionConfig, exist_ok=True)
AutoModel.register(OwlVisionConfig, OwlVisionModel, exist_ok=True)
AutoModel.register(OwlConfig, OwlModel, exist_ok=True)
AutoModelForImageTextToText.register(OwlConfig, OwlForConditionalGeneration, exist_ok=True)
AutoProcessor.register(OwlConfig, OwlProcessor, exist_ok=True)
