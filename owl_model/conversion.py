"""The authors' checkpoints ↔ ours: configurations and names. No weight changes its shape, so both ways are exact.

    family       model_type   language model      official names
    owl          mplug-owl    LLaMA               query_tokens, language_model.model.…
    owl_bloom    mplug-owl    BLOOM               query_tokens, language_model.transformer.…
    owl2         mplug_owl2   LLaMA 2, adaptive   model.layers.…, model.visual_abstractor.query_embeds

The video variant has the model_type of the others and is known by its weights. Read from the release (X-PLUG/mPLUG-Owl,
commit 0f3068fd).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open

if TYPE_CHECKING:
    from owl_model.config import OwlConfig
    from owl_model.modeling import OwlForConditionalGeneration

Names = dict[str, str]

VISUAL: Names = {
    r"^query_tokens$": "model.abstractor.query_tokens",
    r"^temporal_query_tokens$": "model.abstractor.temporal_query_tokens",
    r"^vision_model\.": "model.vision_model.",
    r"^abstractor\.": "model.abstractor.",
    r"^language_model\.lm_head\.": "lm_head.",
}
NAMES: dict[str, Names] = {
    "owl": {**VISUAL, r"^language_model\.model\.": "model.language_model."},
    "owl_bloom": {
        **VISUAL,
        r"^language_model\.transformer\.word_embeddings_layernorm\.": "model.embedding_norm.",
        r"^language_model\.transformer\.": "model.language_model.",
    },
    "owl2": {
        r"^model\.visual_abstractor\.query_embeds$": "model.abstractor.query_tokens",
        r"^model\.visual_abstractor\.": "model.abstractor.",
        r"^model\.embed_tokens\.": "model.language_model.embed_tokens.",
        r"^model\.layers\.": "model.language_model.layers.",
        r"^model\.norm\.": "model.language_model.norm.",
    },
}
"""By family: the beginning of an official name → that of ours; the first that matches."""

UNREAD = (
    "model_type",
    "use_flash_attn",
    "initializer_factor",
    "num_channels",
    "add_v2t_pos_emb",
    "transformers_version",
)
"""Settings of the towers that the release writes and never reads."""


# --- configurations --------------------------------------------------------------------------------------------------


def family(config: OwlConfig) -> str | None:
    """Whose names a checkpoint with this configuration may bear; None for a model of our own."""
    if config.official is None:
        return None
    if config.official["model_type"] == "mplug_owl2":
        return "owl2"
    return "owl_bloom" if config.text_config.model_type == "bloom" else "owl"


def config_from_official(values: dict[str, Any], folder: str | Path) -> dict[str, Any]:
    """Contents of an official config.json → those of OwlConfig; ours pass through untouched."""
    translate = {"mplug-owl": from_owl, "mplug_owl2": from_owl2}.get(values.get("model_type", ""))
    return translate(values, shapes_in(folder)) if translate else values


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
    visual = values.get("visual_config") or {}
    vision, abstractor = known(visual.get("visual_model")), known(visual.get("visual_abstractor"))
    abstractor["attention_dropout"] = abstractor.pop("attention_probs_dropout_prob", 0.0)
    abstractor["num_queries"] = abstractor.pop("num_learnable_queries", 64)
    ours = ("visual_config", "architectures", "model_type")
    return {
        "model_type": "owl",
        "official": values,
        "modality_adaptive": True,
        "vision_config": {"image_size": 448, **vision},
        "abstractor_config": {"grid_size": 32, **abstractor},
        "text_config": {"model_type": "llama", **{k: v for k, v in values.items() if k not in ours}},
    }


def known(values: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (values or {}).items() if name not in UNREAD and value is not None}


def shapes_in(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a local folder, read from headers; empty where there are none."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    for path in sorted(Path(folder).glob("*.bin")) if not found else []:
        weights = torch.load(path, map_location="meta", mmap=True, weights_only=True)
        found |= {name: tuple(value.shape) for name, value in weights.items() if isinstance(value, torch.Tensor)}
    return found


# --- weights ---------------------------------------------------------------------------------------------------------


def official_state(owl: OwlForConditionalGeneration) -> dict[str, torch.Tensor]:
    """All weights (the parameters themselves, not copies) under the authors' names, with the buffers that their files
    hold. Raises ValueError where the model is of no official family."""
    names = NAMES.get(family(owl.config) or "")
    if names is None:
        raise ValueError("only a model that came from an official folder can be written back as one")
    back = {ours: re.sub(r"[\^$\\]", "", theirs) for theirs, ours in names.items()}

    def theirs(name: str) -> str:
        start = next((start for start in back if name.startswith(start)), "")  # some names are the same
        return back.get(start, "") + name.removeprefix(start)

    state = {theirs(name): value for name, value in owl.state_dict(keep_vars=True).items()}
    decoder = owl.model.language_model
    if hasattr(decoder, "rotary_emb"):  # transformers 4.28 and 4.31 wrote the rotary frequencies of every layer
        prefix = "model" if owl.config.modality_adaptive else "language_model.model"
        for index in range(len(decoder.layers)):
            frequencies = decoder.rotary_emb.inv_freq.detach().clone()
            state[f"{prefix}.layers.{index}.self_attn.rotary_emb.inv_freq"] = frequencies
    if owl.config.tie_word_embeddings:
        state.pop("language_model.lm_head.weight", None)  # stands there as the word embeddings
    return state


def write_official(owl: OwlForConditionalGeneration, folder: str | Path) -> None:
    """A folder that the authors' code opens: config.json as it was, and weights under their names."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(official_state(owl), folder)
    (Path(folder) / "config.json").write_text(json.dumps(owl.config.official, indent=2) + "\n")
