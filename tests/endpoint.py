"""Endpoints for tests: ours in a thread, and a small model with letters in its vocabulary."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import queue
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from PIL import Image
from transformers import AutoTokenizer, LlamaConfig

from jobs.bench_gateway import Echo
from owl_model import OwlAbstractorConfig, OwlConfig, OwlForConditionalGeneration, OwlProcessor, OwlVisionConfig
from owl_model.processing import OwlImageProcessor
from pipelines.serving import serve
from pipelines.serving.engine import Ask, Died, Engine, Step
from pipelines.serving.keys import Key
from pipelines.serving.options import Serving
from pipelines.serving.shared import Shared


@contextlib.contextmanager
def alone(
    model: str, settings: Serving, keys: dict[str, Key] | None = None, engine: Any = None
) -> Iterator[tuple[str, Engine]]:
    """Gateway and engine under uvicorn in a thread; yields the address and the engine. ``engine`` makes another."""
    started: queue.Queue = queue.Queue()

    async def work() -> None:
        shared = Shared(settings.media)
        made = engine() if engine else serve.open_engine(model, settings, shared)
        web = serve.open_gateway(model, settings, made, shared, keys)
        port = serve.free_port("127.0.0.1", 0)
        server = uvicorn.Server(serve.uvicorn_config(web, settings, port))
        started.put((server, f"http://127.0.0.1:{port}", made))
        try:
            await server.serve()
        finally:
            made.stop()

    def run() -> None:
        try:
            asyncio.run(work())
        except BaseException as error:
            started.put(error)
            raise

    thread = threading.Thread(target=run)
    thread.start()
    found = started.get(timeout=60)
    if isinstance(found, BaseException):
        raise found
    server, address, made = found
    while not server.started:
        threading.Event().wait(0.01)
    try:
        yield address, made
    finally:
        server.should_exit = True
        thread.join(60)


class Slow(Echo):
    """An engine that writes the same token again and again, one each ``seconds``, and goes away where it is told to:
    ``deaths`` are numbers of tokens after which one answer after another ends."""

    def __init__(self, token: int, seconds: float, deaths: tuple[int, ...] = ()):
        self.token, self.seconds, self.deaths = token, seconds, list(deaths)
        self.asked = 0

    async def submit(self, ask: Ask) -> AsyncGenerator[Step, None]:
        self.asked += 1
        dies = self.deaths.pop(0) if self.deaths else None
        try:
            for number in range(ask.longest):
                if number == dies:
                    raise Died("gone")
                await asyncio.sleep(self.seconds)
                yield Step([self.token], [], "length" if number == ask.longest - 1 else None)
        finally:
            self.asked -= 1


def png(seed: int, side: int = 40) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side + 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def shown(*pictures: bytes, text: str = "what color is the circle ?") -> list[dict]:
    """A question about pictures."""
    images = [{"type": "image_url", "image_url": {"url": uri(data)}} for data in pictures]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


ANIMALS = {
    "type": "object",
    "properties": {"kind": {"enum": ["owl", "cat"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "count"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


def assert_animals(text: str) -> None:
    """That an answer keeps to the schema."""
    found = json.loads(text)
    assert set(found) == {"kind", "count"}
    assert found["kind"] in ("owl", "cat")
    assert 0 <= found["count"] <= 99


def lettered(folder: Path, shared: Path, width: int = 32) -> str:
    """A model folder of random weights that spells: with TinyStories' SentencePiece vocabulary of 512."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "data/weights/tinystories-llama/stories260K")
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OwlConfig(
        vision_config=OwlVisionConfig(**shape, image_size=56, patch_size=14),
        abstractor_config=OwlAbstractorConfig(**shape, encoder_hidden_size=width, num_queries=6),
        text_config=LlamaConfig(**shape, vocab_size=len(tokenizer), max_position_embeddings=512),
    )
    OwlForConditionalGeneration(config).eval().save_pretrained(folder)
    OwlProcessor.for_model(config, OwlImageProcessor(56), tokenizer, "plain").save_pretrained(folder)
    return str(folder)
