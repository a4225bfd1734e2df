"""Models to and from others' weights: back to the authors' folders, a CLIP ViT as the Owl ViT, another picture size."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn
from transformers import CLIPVisionModel

from owl_model.abstractor import AbstractorAttention, grid_positions
from owl_model.config import OwlVisionConfig
from owl_model.modeling import OwlForConditionalGeneration
from owl_model.official import NAMES, Tensors, family, renamed
from owl_model.vision import OwlVisionModel


def official_state(owl: OwlForConditionalGeneration) -> Tensors:
    """All weights (the parameters themselves, where they are not joined) under the authors' names, with the buffers
    that their files hold. Raises ValueError where the model is of no official family."""
    kind = family(owl.config.official)
    if kind is None:
        raise ValueError("only a model that came from an official folder can be written back as one")
    back = {ours: theirs for theirs, ours in NAMES[kind].items()}
    ours = owl.state_dict(keep_vars=True)
    if kind == "owl21":
        ours = joined(ours)
    state = {renamed(name, back): value for name, value in ours.items()}
    decoder = owl.model.language_model
    if kind in ("owl", "owl2"):  # transformers 4.28 and 4.31 wrote the rotary frequencies of every layer
        prefix = "model" if kind == "owl2" else "language_model.model"
        for index in range(len(decoder.layers)):
            frequencies = decoder.rotary_emb.inv_freq.detach().clone()
            state[f"{prefix}.layers.{index}.self_attn.rotary_emb.inv_freq"] = frequencies
    if owl.config.tie_word_embeddings:
        state.pop("language_model.lm_head.weight", None)  # stands there as the word embeddings
    return state


def joined(ours: Tensors) -> Tensors:
    """Query, key and value → Qwen's c_attn."""
    state = {}
    for name, value in ours.items():
        if ".self_attn.q_proj." in name:
            parts = [ours[name.replace(".q_proj.", f".{part}.")] for part in ("q_proj", "k_proj", "v_proj")]
            state[name.replace(".q_proj.", ".c_attn.")] = torch.cat(parts)
        elif ".self_attn.k_proj." not in name and ".self_attn.v_proj." not in name:
            state[name] = value
    return state


def write_official(owl: OwlForConditionalGeneration, folder: str | Path) -> None:
    """A folder that the authors' code opens: config.json as it was, and weights under their names."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(official_state(owl), folder)
    (Path(folder) / "config.json").write_text(json.dumps(owl.config.official, indent=2) + "\n")


def vision_from_clip(folder: str | Path) -> OwlVisionModel:
    """The Owl ViT with the weights of a CLIP ViT's folder, from which mPLUG-Owl began (arXiv 2304.14178, section
    4.1). Query, key and value are woven into one matrix, ordered [head, (q, k, v), head_dim]."""
    clip = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32)
    shape = "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size"
    shape += " hidden_act layer_norm_eps attention_dropout"
    config = OwlVisionConfig(**{name: getattr(clip.config, name) for name in shape.split()})
    heads = config.num_attention_heads

    def woven(layer: str, kind: str) -> torch.Tensor:
        parts = [theirs[f"encoder.layers.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
        return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 2)

    theirs = {name.removeprefix("vision_model."): value for name, value in clip.state_dict().items()}
    ours = {
        "embeddings.cls_token": theirs["embeddings.class_embedding"].view(1, 1, -1),
        "embeddings.position_embedding": theirs["embeddings.position_embedding.weight"].unsqueeze(0),
        "embeddings.patch_embed.weight": theirs["embeddings.patch_embedding.weight"],
    }
    for name, value in theirs.items():
        name = name.replace("pre_layrnorm.", "embeddings.pre_layernorm.")
        if found := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            ours[name.replace("q_proj", "query_key_value")] = woven(*found.groups())
        elif not re.search(r"\.[kv]_proj\.|^embeddings\.(class|position|patch)", name):
            for old, new in (("layer_norm1", "input_layernorm"), ("layer_norm2", "post_attention_layernorm")):
                name = name.replace(old, new)
            ours[name.replace("self_attn.out_proj", "self_attn.dense")] = value
    tower = OwlVisionModel(config)
    tower.load_state_dict(ours)
    return tower


def resize_pictures(owl: OwlForConditionalGeneration, side: int) -> None:
    """Has the model take pictures of ``side`` px, in place, as between mPLUG-Owl2's stages (arXiv 2311.04257, section
    3.3): the vision encoder's position table is interpolated (bicubic, in fp32), the abstractor's positions follow from
    its grid. Raises ValueError for another vision backbone, and for a side that is no multiple of the patch."""
    vision, abstractor = owl.config.vision_config, owl.config.abstractor_config
    if not isinstance(vision, OwlVisionConfig):
        raise ValueError(f"only the Owl ViT changes its picture size, not {vision.model_type}")
    if side % vision.patch_size:
        raise ValueError(f"a picture of {side} px is not cut into patches of {vision.patch_size}")
    embeddings = owl.model.vision_model.embeddings
    grid, before = side // vision.patch_size, embeddings.grid
    vision.image_size = embeddings.image_size = side
    embeddings.grid = grid
    if embeddings.cls_token is not None:
        table = embeddings.position_embedding.detach()
        square = table[:, 1:].float().unflatten(1, (before, before)).permute(0, 3, 1, 2)
        square = nn.functional.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
        table = torch.cat([table[:, :1], square.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
        embeddings.position_embedding = nn.Parameter(table)
    if abstractor.grid_size:
        abstractor.grid_size = grid
        places = grid_positions(abstractor.hidden_size, grid, abstractor.use_cls_token)
        for module in owl.model.abstractor.modules():
            if isinstance(module, AbstractorAttention):
                module.k_pos_embed = places.to(module.q_pos_embed, copy=True)
