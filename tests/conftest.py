"""One Ray for the whole suite, and small worlds and models that the tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from jobs.session import prepare_environment

prepare_environment()
os.environ["RAY_AUTH_MODE"] = "disabled"  # loopback, and nobody types a token in a test

import ray  # noqa: E402

from jobs.parts import assemble, write_tiny_language_model  # noqa: E402
from jobs.recipes import Recipe, demo_small  # noqa: E402
from jobs.world.shards import World, write_world  # noqa: E402
from owl_model import OwlForConditionalGeneration, OwlProcessor  # noqa: E402

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


@pytest.fixture
def owl(model_folder) -> OwlForConditionalGeneration:
    torch.manual_seed(0)
    return OwlForConditionalGeneration.from_pretrained(model_folder).eval()


@pytest.fixture
def processor(model_folder) -> OwlProcessor:
    return OwlProcessor.from_pretrained(model_folder)
