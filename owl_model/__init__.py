"""Owl: mPLUG-Owl as plain PyTorch on transformers. Pictures and words in, a loss or an answer out.

Names are loaded when first used: who only opens pictures or writes templates never waits for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from owl_model.abstractor import OwlAbstractor
    from owl_model.config import OwlAbstractorConfig, OwlConfig, OwlVisionConfig
    from owl_model.modeling import OwlForConditionalGeneration, OwlModel
    from owl_model.processing import OwlImageProcessor, OwlProcessor
    from owl_model.vision import OwlVisionModel

PLACES = {
    "OwlAbstractor": "abstractor",
    "OwlAbstractorConfig": "config",
    "OwlConfig": "config",
    "OwlForConditionalGeneration": "modeling",
    "OwlImageProcessor": "processing",
    "OwlModel": "modeling",
    "OwlProcessor": "processing",
    "OwlVisionConfig": "config",
    "OwlVisionModel": "vision",
}
__all__ = [
    "OwlAbstractor",
    "OwlAbstractorConfig",
    "OwlConfig",
    "OwlForConditionalGeneration",
    "OwlImageProcessor",
    "OwlModel",
    "OwlProcessor",
    "OwlVisionConfig",
    "OwlVisionModel",
]


def __getattr__(name: str):
    if name not in PLACES:
        raise AttributeError(f"module 'owl_model' has no attribute {name!r}")
    return getattr(import_module(f"owl_model.{PLACES[name]}"), name)
