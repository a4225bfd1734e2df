"""One Ray for the whole suite, and small worlds and models that the tests share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from jobs.session import prepare_environment

prepare_environment()
os.environ["RAY_AUTH_MODE"] = "disabled"  # loopback, and nobody types a token in a test

import ray  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from transformers import (  # noqa: E402
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    LlamaConfig,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from jobs.parts import assemble, write_tiny_language_model  # noqa: E402
from jobs.recipes import Recipe, demo_small  # noqa: E402
from jobs.world.shards import World, write_world  # noqa: E402
from owl_model import (  # noqa: E402
    OwlAbstractorConfig,
    OwlConfig,
    OwlForConditionalGeneration,
    OwlProcessor,
    OwlVisionConfig,
)
from owl_model.official import OWL2_ADAPTIVE  # noqa: E402

TINY_WORLD = World(pairs=120, instructions=40, texts=60, questions=6, shards=3)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared data, or a skip with the reason."""
    path = Path(os.environ.get("OWL_SHARED", "../shared"))
    if not path.is_dir():
        pytest.skip(f"no shared data at {path}; name it with OWL_SHARED")
    return path


GOLDEN = [
    "v1_one_image",
    "v1_one_image_b",
    "v1_one_image_n005",
    "v1_batch2",
    "v1_text_only",
    "v1_bloom_batch2",
    "v1_video_4frames",
    "v1_video_and_image",
    "v1_video_weights_image_only",
    "v2_one_image",
    "v2_one_image_b",
    "v2_one_image_n005",
    "v2_batch2",
    "v2_mixed_batch",
    "v2_nocls_one_image",
    "v2_text_only",
]


@pytest.fixture(params=GOLDEN)
def golden(shared, request) -> Path:
    """Each case of reference outputs, one after another."""
    return shared / "golden" / request.param


@pytest.fixture(scope="session")
def cluster():
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=150 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for part in ("pairs", "instructions", "text", "heldout"):
        write_world(folder, TINY_WORLD, part)
    return folder


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return demo_small()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, recipe) -> str:
    folder = tmp_path_factory.mktemp("model")
    words = "circle square red large at top-left what color is the ? yes no one two three . ,"
    write_tiny_language_model([words], f"{folder}/language")
    assemble(recipe.parts.model_copy(update={"language_model": f"{folder}/language"}), f"{folder}/owl")
    return f"{folder}/owl"


@pytest.fixture(scope="session")
def scorers(tmp_path_factory) -> dict[str, str]:
    """Untrained scorers of pictures: a CLIP, a head on its embeddings, and a classifier."""
    folder = tmp_path_factory.mktemp("scorers")
    torch.manual_seed(0)
    text = "a the circle square triangle star cross ring red green blue yellow large small left right top bottom"
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *text.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=32
    )
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    clip = CLIPModel(
        CLIPConfig(
            text_config={**size, "vocab_size": len(vocabulary), "max_position_embeddings": 32, "eos_token_id": 1},
            vision_config={**size, "image_size": 32, "patch_size": 8},
            projection_dim=16,
        )
    )
    clip.save_pretrained(folder / "clip")
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, fast).save_pretrained(folder / "clip")
    head = {
        "layers.0.weight": torch.randn(8, 16),
        "layers.0.bias": torch.zeros(8),
        "layers.2.weight": torch.randn(1, 8),
        "layers.2.bias": torch.ones(1),
    }
    save_file(head, folder / "head.safetensors")
    torch.save(head, folder / "head.pth")
    config = ViTConfig(**size, image_size=32, patch_size=8, id2label={0: "clean", 1: "Watermark"})
    ViTForImageClassification(config).save_pretrained(folder / "marks")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "marks")
    return {"clip": f"{folder}/clip", "head": f"{folder}/head.safetensors", "marks": f"{folder}/marks"}


@pytest.fixture
def owl(model_folder) -> OwlForConditionalGeneration:
    torch.manual_seed(0)
    return OwlForConditionalGeneration.from_pretrained(model_folder).eval()


@pytest.fixture
def processor(model_folder) -> OwlProcessor:
    return OwlProcessor.from_pretrained(model_folder)


@pytest.fixture(params=["owl1", "owl2"])
def pair(request, processor) -> tuple[OwlForConditionalGeneration, OwlProcessor]:
    return wide_random(request.param, processor)


def wide_random(family: str, processor: OwlProcessor, width: int = 32):
    """A family at a tiny size with wide random weights, so that a mistake shows: mPLUG-Owl with temporal modules, and
    mPLUG-Owl2 with grouped-query attention, which the original could not run."""
    torch.manual_seed(0)
    second = family == "owl2"
    shape = {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OwlConfig(
        vision_config=OwlVisionConfig(**shape, image_size=56, patch_size=14, temporal=not second),
        abstractor_config=OwlAbstractorConfig(
            **shape,
            encoder_hidden_size=width,
            num_queries=6,
            grid_size=4 if second else 0,
            temporal=not second,
        ),
        text_config=LlamaConfig(
            **shape,
            vocab_size=len(processor.tokenizer),
            num_key_value_heads=2 if second else 4,
            max_position_embeddings=512,
        ),
        adaptive_modules=OWL2_ADAPTIVE if second else (),
    )
    owl = OwlForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in owl.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    images = type(processor.image_processor)(56)
    return owl, OwlProcessor.for_model(config, images, processor.tokenizer, family)


CAMERA = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")


@pytest.fixture
def chromium():
    """A real browser, or a skip with the reason. Playwright keeps an event loop running for as long as it is there."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright; `make browser` installs it")
    with playwright.sync_playwright() as started:
        path = shutil.which("chromium") or started.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no Chromium; `make browser` installs it")
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox", *CAMERA])
        yield browser
        browser.close()
