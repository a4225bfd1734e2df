"""Any vision backbone of transformers and any decoder of attention layers, put together and told apart."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BloomConfig,
    CLIPConfig,
    ConvNextConfig,
    Dinov2Config,
    DINOv3ViTConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MobileNetV2Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Siglip2Config,
    SiglipConfig,
    SwinConfig,
)

from owl_model import OwlAbstractorConfig, OwlForConditionalGeneration
from owl_model.official import OWL2_ADAPTIVE
from owl_model.vision import look

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VIT = {**SMALL, "image_size": 28, "patch_size": 14}
WORDS = {**SMALL, "vocab_size": 40}
CNN = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
SIGLIP2 = {**SMALL, "patch_size": 14, "num_patches": 4}

BACKBONES = {
    "clip": (CLIPConfig(vision_config=VIT, text_config=WORDS), 28, 5),
    "siglip": (SiglipConfig(vision_config=VIT, text_config=WORDS), 28, 4),
    "siglip2": (Siglip2Config(vision_config=SIGLIP2, text_config=WORDS), 28, 4),
    "dinov2": (Dinov2Config(**VIT), 28, 5),
    "dinov3": (DINOv3ViTConfig(**VIT), 28, 5),
    "mobilenet_v2": (MobileNetV2Config(), 64, 4),
    "convnext": (ConvNextConfig(**CNN), 64, 4),
    "swin": (SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4), 32, 16),
}
"""Configuration, side of its pictures, features of a picture."""

LLAMA = {**WORDS, "num_key_value_heads": 2}
DECODERS = {
    "llama": LlamaConfig(**LLAMA),
    "mistral": MistralConfig(**LLAMA, sliding_window=8),
    "qwen2": Qwen2Config(**LLAMA),
    "qwen3": Qwen3Config(**LLAMA, head_dim=8),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=40),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40),
    "phi": PhiConfig(**LLAMA),
    "gemma2": Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=0.05),
    "granite": GraniteConfig(**LLAMA, logits_scaling=3.0),
    "falcon": FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=40),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of untrained models, made when first asked for."""
    made: dict[str, str] = {}

    def folder(config, causal: bool) -> str:
        name = f"{config.model_type}-{causal}"
        if name not in made:
            made[name] = str(tmp_path_factory.mktemp(name))
            torch.manual_seed(0)
            (AutoModelForCausalLM if causal else AutoModel).from_config(config).save_pretrained(made[name])
        return made[name]

    return folder


def abstractor() -> OwlAbstractorConfig:
    return OwlAbstractorConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_queries=4
    )


def answers(owl, side: int) -> torch.Tensor:
    ids = torch.tensor([[1, 2, *[owl.config.image_token_id] * 5, 3, 4]])
    pixels = torch.randn(1, 3, side, side)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    made = owl.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, **options)
    return made[0, ids.shape[1] :]


@pytest.mark.parametrize("name", BACKBONES)
def test_any_vision_backbone(folders, tmp_path, name):
    config, side, features = BACKBONES[name]
    folder = folders(config, False)
    owl = OwlForConditionalGeneration.from_parts(folder, folders(DECODERS["llama"], True), abstractor())
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        seen = look(owl.eval().model.vision_model, pixels)
        assert seen.shape == (2, features, owl.config.abstractor_config.encoder_hidden_size)
        if name in ("dinov2", "dinov3", "swin"):
            theirs = AutoModel.from_pretrained(folder).eval()(pixel_values=pixels).last_hidden_state
            torch.testing.assert_close(seen, theirs)
    assert len(answers(owl, side)) == 5
    owl.save_pretrained(tmp_path)
    again = OwlForConditionalGeneration.from_pretrained(tmp_path)
    for key, value in owl.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_any_decoder(folders, tmp_path, name, adaptive):
    vision, language = folders(BACKBONES["dinov2"][0], False), folders(DECODERS[name], True)
    modules = OWL2_ADAPTIVE if adaptive else ()
    if adaptive and name not in ("llama", "mistral", "qwen2", "qwen3"):
        with pytest.raises(ValueError, match=f"fits decoders of LLaMA's shape .*, not {name!r}"):
            OwlForConditionalGeneration.from_parts(vision, language, abstractor(), modules)
        return
    owl = OwlForConditionalGeneration.from_parts(vision, language, abstractor(), modules)
    ids = torch.arange(20)[None]
    with torch.no_grad():  # text goes through Owl as through its language model alone
        wanted = AutoModelForCausalLM.from_pretrained(language).eval()(input_ids=ids).logits
        torch.testing.assert_close(owl.eval()(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-4)
    assert len(answers(owl, 28)) == 5
    owl.save_pretrained(tmp_path)
    again = OwlForConditionalGeneration.from_pretrained(tmp_path)
    for key, value in owl.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_the_visual_side_of_the_adaptive_module_starts_as_a_copy(folders):
    vision, language = folders(BACKBONES["dinov2"][0], False), folders(DECODERS["qwen3"], True)
    owl = OwlForConditionalGeneration.from_parts(vision, language, abstractor(), OWL2_ADAPTIVE)
    weights = owl.state_dict()
    copies = [name for name in weights if ".multiway.1." in name]
    assert len(copies) == 2 * 4
    for name in copies:
        assert torch.equal(weights[name], weights[name.replace(".multiway.1.", ".multiway.0.")])


def test_what_is_no_decoder_of_attention_layers_is_refused(folders):
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=40)
    with pytest.raises(ValueError, match="mamba keeps no past_key_values"):
        OwlForConditionalGeneration.from_parts(
            folders(BACKBONES["dinov2"][0], False), folders(config, True), abstractor()
        )
