"""Official folders ↔ ours: every name, every shape, every bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel

from owl_model import OwlConfig, OwlForConditionalGeneration
from owl_model.conversion import official_state, resize_pictures, vision_from_clip, write_official

VISION = {"hidden_size": 1024, "image_size": 224, "patch_size": 14}
ABSTRACTOR = {"hidden_size": 1024, "encoder_hidden_size": 1024, "intermediate_size": 2816}
LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
BLOOM = {"model_type": "bloom", "vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32}
QWEN = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "seq_length": 8192,
    "multiway": True,
}
OWL2_VISUAL = {"visual_config": {"visual_model": {**VISION, "image_size": 448}, "visual_abstractor": ABSTRACTOR}}
OWL1_VISUAL = {"vision_config": VISION, "visual_abstractor_config": ABSTRACTOR}

OFFICIAL_7B = {
    "v1_llama7b": {"model_type": "mplug-owl", **OWL1_VISUAL, "text_config": LLAMA},
    "v1_bloomz7b": {"model_type": "mplug-owl", **OWL1_VISUAL, "text_config": BLOOM},
    "v1_video_llama7b": {"model_type": "mplug-owl", **OWL1_VISUAL, "text_config": LLAMA},
    "v2_llama2_7b": {"model_type": "mplug_owl2", **OWL2_VISUAL, **LLAMA},
    "v2_1_qwen7b_default_visual": {"model_type": "mplug_owl2_1", **OWL2_VISUAL, **QWEN},
}


def official_folder(path, values: dict, weights: dict):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(values))
    if weights:
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("variant", OFFICIAL_7B)
def test_official_7b_names_and_shapes_are_ours_none_missing_none_left_over(shared, tmp_path, variant):
    table = {}
    for line in (shared / "facts" / "keys" / f"{variant}.tsv").read_text().splitlines():
        name, shape, kind = line.split("\t")
        if not (kind != "param" and name.endswith("lm_head.weight")):  # tied: stands there as the word embeddings
            table[name] = tuple(json.loads(shape.replace("(", "[").replace(",)", "]").replace(")", "]")))
    temporal = {name: torch.zeros(1) for name in ["temporal_query_tokens"] if name in table}
    config = OwlConfig.from_pretrained(official_folder(tmp_path / "model", OFFICIAL_7B[variant], temporal))
    with torch.device("meta"):
        owl = OwlForConditionalGeneration(config)
    assert {name: tuple(value.shape) for name, value in official_state(owl).items()} == table


def test_official_to_ours_to_official_is_bit_identical(golden, tmp_path):
    OwlForConditionalGeneration.from_pretrained(golden).save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "owl"
    write_official(OwlForConditionalGeneration.from_pretrained(tmp_path / "ours"), tmp_path / "theirs")
    wanted, found = load_file(golden / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == value.dtype
    assert json.loads((tmp_path / "theirs" / "config.json").read_text()) == json.loads(
        (golden / "config.json").read_text()
    )


def logits(owl) -> torch.Tensor:
    torch.manual_seed(0)
    vision = owl.config.vision_config
    ids = torch.cat([torch.tensor([5, 6]), torch.full((owl.config.visual_tokens,), owl.config.image_token_id)])
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size)
    with torch.no_grad():
        return owl.eval()(input_ids=torch.cat([ids, torch.tensor([7, 8])])[None], pixel_values=pixels).logits


@pytest.mark.parametrize("case", ["v1_one_image", "v2_one_image"])
def test_a_folder_of_bin_files_is_the_same(shared, tmp_path, case):
    folder = shared / "golden" / case
    weights = load_file(folder / "model.safetensors")
    official_folder(tmp_path / "bin", json.loads((folder / "config.json").read_text()), {})
    torch.save(weights, tmp_path / "bin" / "pytorch_model.bin")
    theirs, ours = (OwlForConditionalGeneration.from_pretrained(path) for path in (folder, tmp_path / "bin"))
    assert torch.equal(logits(theirs), logits(ours))


@pytest.mark.parametrize("case", ["v1_one_image", "v2_one_image"])
def test_unmerged_lora_is_merged(shared, tmp_path, case):
    folder = shared / "golden" / case
    weights = load_file(folder / "model.safetensors")
    suffix = "q_proj.weight" if case.startswith("v1") else "v_proj.multiway.1.weight"
    adapted = [name for name in weights if name.endswith(suffix)]
    torch.manual_seed(0)
    unmerged = {f"base_model.model.{name}": value for name, value in weights.items()}
    for name in adapted:
        rows, columns = weights[name].shape
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        unmerged[f"{stem}.lora_A.default.weight"] = down = torch.randn(4, columns)
        unmerged[f"{stem}.lora_B.default.weight"] = up = torch.randn(rows, 4)
        weights[name] = weights[name] + 8.0 * (up @ down)
    config = json.loads((folder / "config.json").read_text())
    by_hand = official_folder(tmp_path / "by_hand", config, weights)
    lora = official_folder(tmp_path / "lora", config, unmerged)
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        OwlForConditionalGeneration.from_pretrained(lora)
    (lora / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 32}))
    first, second = (OwlForConditionalGeneration.from_pretrained(path) for path in (by_hand, lora))
    torch.testing.assert_close(logits(second), logits(first))


@pytest.mark.parametrize("multiway", [True, False])
def test_owl21_is_cut_and_joined_without_loss(tmp_path, multiway):
    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    values = {
        "model_type": "mplug_owl2_1",
        **{**QWEN, **tiny, "intermediate_size": 128, "vocab_size": 40, "multiway": multiway},
        "visual_config": {
            "visual_model": {**tiny, "image_size": 28, "patch_size": 14},
            "visual_abstractor": {**tiny, "encoder_hidden_size": 32, "grid_size": 2, "num_learnable_queries": 4},
        },
    }
    config = OwlConfig.from_pretrained(official_folder(tmp_path / "config", values, {}))
    owl = OwlForConditionalGeneration(config).eval()
    write_official(owl, tmp_path / "theirs")
    again, report = OwlForConditionalGeneration.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(logits(again), logits(owl))
    official = load_file(tmp_path / "theirs" / "model.safetensors")
    middle = ".multiway.1" if multiway else ""
    assert official[f"transformer.h.0.attn.c_attn{middle}.weight"].shape == (96, 32)


def test_the_owl_vit_begins_as_clips(tmp_path):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    clip = CLIPVisionModel(config).eval()
    clip.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        last = clip(pixel_values=pixels).last_hidden_state
        wanted = clip.state_dict()
        prefix = next(name for name in wanted if name.endswith("post_layernorm.weight")).removesuffix("weight")
        norm = [wanted[prefix + kind] for kind in ("weight", "bias")]
        wanted = torch.nn.functional.layer_norm(last, (32,), *norm, eps=config.layer_norm_eps)
        ours = vision_from_clip(tmp_path).eval()(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "clip_vision_model"


def test_a_model_takes_pictures_of_another_size(pair, tmp_path):
    """As between mPLUG-Owl2's stages: saved and opened again, a flat picture still gives flat features."""
    owl, _ = pair
    resize_pictures(owl, 84)
    owl.save_pretrained(tmp_path)
    again = OwlForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.vision_config.image_size == 84
    pictures = torch.rand(2, 3, 84, 84)
    with torch.no_grad():
        seen = [each.get_image_features(pictures).pooler_output for each in (owl, again)]
    torch.testing.assert_close(seen[0], seen[1])
    with pytest.raises(ValueError, match="is not cut into patches of 14"):
        resize_pictures(owl, 90)


def test_positions_of_another_size_lie_between_those_that_were(pair):
    owl, _ = pair
    table = owl.model.vision_model.embeddings.position_embedding
    with torch.no_grad():  # a slope from top to bottom stays one
        table[:, 1:] = torch.arange(16.0).div(4, rounding_mode="floor")[:, None]
    first = table[:, 0].clone()
    resize_pictures(owl, 112)
    table = owl.model.vision_model.embeddings.position_embedding
    assert table.shape[1] == 65
    assert torch.equal(table[:, 0], first)
    rows = table[0, 1:, 0].unflatten(0, (8, 8))
    assert (rows.diff(dim=0)[1:-1] > 0).all()
    assert rows.diff(dim=1).abs().max() < 1e-4
