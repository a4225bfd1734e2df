"""What an official checkpoint of the authors' is made of: its names, its configuration, its weights as ours.

    family       model_type    language model      official names
    owl          mplug-owl     LLaMA               query_tokens, language_model.model.…
    owl_bloom    mplug-owl     BLOOM               query_tokens, language_model.transformer.…
    owl2         mplug_owl2    LLaMA 2, adaptive   model.layers.…, model.visual_abstractor.query_embeds
    owl21        mplug_owl2_1  Qwen                transformer.h.…, transformer.visual_abstractor.query_embeds

The video variant has the model_type of the others and is known by its weights. Read from the release (X-PLUG/mPLUG-Owl,
commit 0f3068fd). Qwen's fused ``c_attn`` is cut into the query, key and value of transformers' Qwen2, whose layer is
otherwise the same within the length it was trained for.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

Names = dict[str, str]
Tensors = dict[str, torch.Tensor]

VISUAL: Names = {
    "query_tokens": "model.abstractor.query_tokens",
    "temporal_query_tokens": "model.abstractor.temporal_query_tokens",
    "vision_model.": "model.vision_model.",
    "abstractor.": "model.abstractor.",
    "language_model.lm_head.": "lm_head.",
}
NAMES: dict[str, Names] = {
    "owl": {**VISUAL, "language_model.model.": "model.language_model."},
    "owl_bloom": {
        **VISUAL,
        "language_model.transformer.word_embeddings_layernorm.": "model.embedding_norm.",
        "language_model.transformer.": "model.language_model.",
    },
    "owl2": {
        "model.visual_abstractor.query_embeds": "model.abstractor.query_tokens",
        "model.visual_abstractor.": "model.abstractor.",
        "model.embed_tokens.": "model.language_model.embed_tokens.",
        "model.layers.": "model.language_model.layers.",
        "model.norm.": "model.language_model.norm.",
    },
    "owl21": {
        "transformer.visual_abstractor.query_embeds": "model.abstractor.query_tokens",
        "transformer.visual_abstractor.": "model.abstractor.",
        "transformer.vision_model.": "model.vision_model.",
        "transformer.wte.": "model.language_model.embed_tokens.",
        "transformer.ln_f.": "model.language_model.norm.",
        "transformer.h.*.ln_1.": "model.language_model.layers.*.input_layernorm.",
        "transformer.h.*.ln_2.": "model.language_model.layers.*.post_attention_layernorm.",
        "transformer.h.*.attn.c_proj.": "model.language_model.layers.*.self_attn.o_proj.",
        "transformer.h.*.attn.c_attn.": "model.language_model.layers.*.self_attn.c_attn.",
        "transformer.h.*.mlp.w1.": "model.language_model.layers.*.mlp.up_proj.",
        "transformer.h.*.mlp.w2.": "model.language_model.layers.*.mlp.gate_proj.",
        "transformer.h.*.mlp.c_proj.": "model.language_model.layers.*.mlp.down_proj.",
    },
}
"""By family: how an official name begins → how ours does, a star for the layer's number; the first that fits."""

OWL2_ADAPTIVE = ("input_layernorm", "post_attention_layernorm", "k_proj", "v_proj")
OWL21_ADAPTIVE = ("q_proj", "k_proj", "v_proj")

UNREAD = (
    "model_type",
    "use_flash_attn",
    "initializer_factor",
    "num_channels",
    "add_v2t_pos_emb",
    "transformers_version",
)
"""Settings of the towers that the release writes and never reads."""


def renamed(name: str, names: Names) -> str:
    """The name under the first beginning that fits; as it is where none does."""
    for start, other in names.items():
        pattern = re.escape(start).replace(r"\*", r"(\d+)")
        if found := re.match(pattern, name):
            return found.expand(other.replace("*", r"\1")) + name[found.end() :]
    return name


def patterns(family: str) -> Names:
    """The names as transformers' ``key_mapping``: regular expressions → replacements."""
    table = NAMES[family].items()
    return {"^" + re.escape(a).replace(r"\*", r"(\d+)"): b.replace("*", r"\1") for a, b in table}


# --- configurations --------------------------------------------------------------------------------------------------


def family(values: dict[str, Any] | None) -> str | None:
    """Whose names a checkpoint with this official configuration bears; None without one."""
    if values is None:
        return None
    if values["model_type"] != "mplug-owl":
        return "owl2" if values["model_type"] == "mplug_owl2" else "owl21"
    return "owl_bloom" if (values.get("text_config") or {}).get("model_type") == "bloom" else "owl"


def config_from_official(values: dict[str, Any], folder: str | Path) -> dict[str, Any]:
    """Contents of an official config.json → those of OwlConfig; ours pass through untouched."""
    translate = {"mplug-owl": from_owl, "mplug_owl2": from_owl2, "mplug_owl2_1": from_owl21}
    kind = values.get("model_type", "")
    return translate[kind](values, shapes_in(folder)) if kind in translate else values


def from_owl(values: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    video = "temporal_query_tokens" in shapes
    vision, abstractor = known(values.get("vision_config")), known(values.get("visual_abstractor_config"))
    # Some files state 4096 over weights of 2816 (X-PLUG/mPLUG-Owl#160), and the video code rounds: weights are right.
    w1 = shapes.get("abstractor.encoder.layers.0.crossattention.output.mlp.w1.weight")
    if w1:
        abstractor["intermediate_size"] = w1[0]
    abstractor["attention_dropout"] = abstractor.pop("attention_probs_dropout_prob", 0.1)
    return {
        "model_type": "owl",
        "official": values,
        "vision_config": {**vision, "hidden_act": "quick_gelu", "temporal": video},  # the release hard-wires it
        "abstractor_config": {**abstractor, "num_queries": values.get("num_query_tokens", 64), "temporal": video},
        "text_config": {"model_type": "llama", **(values.get("text_config") or {})},
    }


def from_owl2(values: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    ours = ("visual_config", "architectures", "model_type")
    text = {"model_type": "llama", **{k: v for k, v in values.items() if k not in ours}}
    return {**visual_of_owl2(values), "adaptive_modules": list(OWL2_ADAPTIVE), "text_config": text}


def from_owl21(values: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Qwen's configuration as Qwen2's. Raises ValueError for what that cannot express."""
    if values.get("rotary_pct", 1.0) != 1.0:
        raise ValueError(f"rotary_pct {values['rotary_pct']}: only whole heads (1.0) can be rotated here")
    multiway = any(".c_attn.multiway." in name for name in shapes) or values.get("multiway", False)
    text = {
        "model_type": "qwen2",
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "intermediate_size": values["intermediate_size"] // 2,  # Qwen counts both halves of SwiGLU
        "num_hidden_layers": values["num_hidden_layers"],
        "num_attention_heads": values["num_attention_heads"],
        "num_key_value_heads": values["num_attention_heads"],
        "rms_norm_eps": values.get("layer_norm_epsilon", 1e-6),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(values.get("rotary_emb_base", 10000))},
        "max_position_embeddings": values.get("seq_length") or values.get("max_position_embeddings", 8192),
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
    }
    return {
        **visual_of_owl2(values),
        "adaptive_modules": list(OWL21_ADAPTIVE) if multiway else [],
        "text_config": text,
    }


def visual_of_owl2(values: dict[str, Any]) -> dict[str, Any]:
    visual = values.get("visual_config") or {}
    vision, abstractor = known(visual.get("visual_model")), known(visual.get("visual_abstractor"))
    abstractor["attention_dropout"] = abstractor.pop("attention_probs_dropout_prob", 0.0)
    abstractor["num_queries"] = abstractor.pop("num_learnable_queries", 64)
    return {
        "model_type": "owl",
        "official": values,
        "vision_config": {"image_size": 448, **vision},
        "abstractor_config": {"grid_size": 32, **abstractor},
    }


def known(values: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (values or {}).items() if name not in UNREAD and value is not None}


def weight_files(folder: str | Path) -> list[Path]:
    """Safetensors where there are any, else .bin (without the optimizer's and arguments' files)."""
    safe = sorted(Path(folder).glob("*.safetensors"))
    skipped = ("training_args", "optimizer", "scheduler")
    return safe or [path for path in sorted(Path(folder).glob("*.bin")) if path.stem not in skipped]


def shapes_in(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a local folder, read from headers; empty where there are none."""
    found: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
        else:
            weights = torch.load(path, map_location="meta", mmap=True, weights_only=True)
            found |= {name: tuple(value.shape) for name, value in weights.items()}
    return {name.removeprefix("base_model.model."): shape for name, shape in found.items()}


# --- weights ---------------------------------------------------------------------------------------------------------


def rewritten(folder: str | Path, kind: str) -> Tensors | None:
    """Weights of an official folder under our names, where renaming alone does not do: LoRA is merged, and Qwen's
    c_attn cut. None where renaming does."""
    adapted = any(".lora_A." in name for name in shapes_in(folder))
    if not adapted and kind != "owl21":
        return None
    weights: Tensors = {}
    for path in weight_files(folder):
        read = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        weights |= {name.removeprefix("base_model.model."): value for name, value in read.items()}
    if adapted:
        weights = merged(weights, folder)
    ours = {renamed(name, NAMES[kind]): value for name, value in weights.items() if not name.endswith(".inv_freq")}
    return parted(ours) if kind == "owl21" else ours


def parted(ours: Tensors) -> Tensors:
    """Qwen's c_attn → query, key and value."""
    state = {}
    for name, value in ours.items():
        if ".c_attn." in name:
            for part, piece in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True):
                state[name.replace(".c_attn.", f".{part}.")] = piece.contiguous()
        else:
            state[name] = value
    return state


def merged(weights: Tensors, folder: str | Path) -> Tensors:
    """LoRA folded into what it adapts: W + alpha / r · B A (peft's names, `base_layer` or not). Raises ValueError
    without adapter_config.json, which alone tells alpha."""
    path = Path(folder) / "adapter_config.json"
    if not path.exists():
        raise ValueError(f"{folder} holds LoRA weights, but no adapter_config.json that tells their scale")
    adapter = json.loads(path.read_text())
    scale = adapter["lora_alpha"] / (adapter["r"] ** (0.5 if adapter.get("use_rslora") else 1))
    plain = {name.replace(".base_layer.", "."): value for name, value in weights.items() if ".lora_" not in name}
    for name, down in weights.items():
        if ".lora_A." in name:
            up = weights[name.replace(".lora_A.", ".lora_B.")]
            base = name.partition(".lora_A.")[0] + ".weight"
            plain[base] = (plain[base].float() + scale * up.float() @ down.float()).to(plain[base].dtype)
    return plain
