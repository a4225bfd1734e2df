"""A new Owl from foundation parts: the folder that the first stage of training begins from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from jobs.recipes import Parts
from owl_model import (
    OwlAbstractorConfig,
    OwlForConditionalGeneration,
    OwlImageProcessor,
    OwlProcessor,
    OwlVisionConfig,
)
from owl_model.chat import TEMPLATES
from owl_model.conversion import vision_from_clip, write_official
from owl_model.official import OWL2_ADAPTIVE
from pipelines.settings import OwlError


def assemble(parts: Parts, folder: str, seed: int = 0) -> None:
    """Writes a model folder with the given towers and a fresh abstractor. Raises OwlError for a missing tower, and
    for towers that do not fit each other."""
    if (Path(folder) / "finished").exists():
        return
    for name, tower in (("parts.vision", parts.vision), ("parts.language_model", parts.language_model)):
        if isinstance(tower, str) and not (Path(tower) / "config.json").exists():
            raise OwlError(f"{name} is {tower!r}, where there is no model folder (no config.json)")
    torch.manual_seed(seed)
    try:
        abstractor = OwlAbstractorConfig(**parts.abstractor)
        adaptive = OWL2_ADAPTIVE if parts.adaptive else ()
        owl = OwlForConditionalGeneration.from_parts(tower_of(parts), parts.language_model, abstractor, adaptive)
        tokenizer = AutoTokenizer.from_pretrained(parts.language_model)
        processor = OwlProcessor.for_model(owl.config, image_processor_of(parts), tokenizer, parts.template)
    except ValueError as error:
        raise OwlError(str(error)) from None
    owl.save_pretrained(folder)
    processor.save_pretrained(folder)
    (Path(folder) / "finished").touch()


def tower_of(parts: Parts):
    """A fresh Owl ViT's configuration, a CLIP ViT as the Owl ViT that mPLUG-Owl made of it, or a backbone's folder."""
    if isinstance(parts.vision, dict):
        return OwlVisionConfig(**parts.vision)
    kind = json.loads((Path(parts.vision) / "config.json").read_text()).get("model_type")
    return vision_from_clip(parts.vision) if kind in ("clip", "clip_vision_model") else parts.vision


def rewrite(model: str, to: str, folder: str) -> None:
    """A model folder, ours or the authors', as ours ("owl") or theirs ("official")."""
    if not (Path(model) / "config.json").exists():
        raise OwlError(f"no model folder at {model!r}: it has no config.json")
    if to not in ("owl", "official"):
        raise OwlError(f"--to is owl or official, not {to!r}")
    owl = OwlForConditionalGeneration.from_pretrained(model)
    spoken = any(Path(model).glob("tokenizer*"))
    if to == "official":
        try:
            write_official(owl, folder)
        except ValueError as error:
            raise OwlError(f"{model}: {error}") from None
        if spoken:
            AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    else:
        owl.save_pretrained(folder)
        if spoken:
            OwlProcessor.from_pretrained(model).save_pretrained(folder)
    for name in ("tokenizer.model", "preprocessor_config.json"):  # what the authors' code opens, and ours need not
        if (Path(model) / name).exists():
            shutil.copy(Path(model) / name, folder)


def image_processor_of(parts: Parts) -> OwlImageProcessor:
    """The preprocessing that a pretrained backbone was trained with; CLIP's for a fresh one."""
    if isinstance(parts.vision, dict):
        return OwlImageProcessor(parts.vision.get("image_size", 224))
    path = Path(parts.vision) / "preprocessor_config.json"
    if not path.exists():
        raise OwlError(f"parts.vision {parts.vision!r} has no preprocessor_config.json, so its input is unknown")
    pictures = OwlImageProcessor.from_backbone(json.loads(path.read_text()))
    pictures.image_size = parts.image_size or pictures.image_size
    return pictures


def write_tiny_language_model(texts: Iterable[str], folder: str, seed: int = 0) -> None:
    """An untrained LLaMA of 200,000 parameters with a tokenizer of its own, fitted to ``texts``."""
    if (Path(folder) / "finished").exists():
        return
    tokenizer = train_tokenizer(texts)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (Path(folder) / "finished").touch()


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Whole words, lower case, punctuation apart; the words that open a turn are one token each.

    No byte or subword pieces: tokens that never occur slowed this small model's learning threefold (docs/log.md)."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?.,:!]"), "isolated")]
    )
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    plain = TEMPLATES["plain"]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (plain.user, plain.assistant)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
