"""`owl chat --replay`: an answer of an endpoint again, from its receipt."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.serving.engine import Ask, Picture, Sampling
from pipelines.serving.models import digest
from pipelines.serving.options import Serving
from pipelines.serving.serve import open_engine
from pipelines.serving.shared import Shared
from pipelines.settings import OwlError


def replay(path: Path, model: str, pictures: Sequence[Path], adapter: str = "") -> list[dict[str, Any]]:
    """Each choice's text now, and whether its tokens are those of the receipt (or of an answer that holds one). Raises
    OwlError where model, adapter or pictures are not those."""
    from owl_model import OwlProcessor

    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError):
        raise OwlError(f"{path} holds no JSON") from None
    receipt = told.get("owl", {}).get("receipt", told)
    if "choices" not in receipt or "model" not in receipt:
        raise OwlError(f"{path} holds no receipt; ask with receipt=true")
    for name, folder, wanted in (("model", model, receipt["model"]), ("adapter", adapter, receipt["adapter"])):
        if (digest(folder) if folder else None) != wanted:
            raise OwlError(f"the receipt is of another {name} than {folder or 'none'}")
    processor = OwlProcessor.from_pretrained(model)
    shown = {}
    for picture in pictures:
        pixels = processor.image_processor.pixels(picture.read_bytes()).numpy()
        shown[hashlib.sha256(pixels.tobytes()).hexdigest()] = pixels
    for choice in receipt["choices"]:
        if missing := set(choice["pictures"]) - set(shown):
            raise OwlError(f"{len(missing)} of the receipt's pictures are not among those given; name them by --image")
    settings = Serving(precision=receipt["precision"])
    name = f"{adapter}@{digest(adapter)}" if adapter else ""
    made = asyncio.run(again(receipt["choices"], model, settings, shown, name))
    return [
        {
            "text": processor.tokenizer.decode(tokens, skip_special_tokens=True),
            "same": tokens == choice["token_ids"],
        }
        for tokens, choice in zip(made, receipt["choices"], strict=True)
    ]


async def again(choices: list[dict], model: str, settings: Serving, shown: dict, adapter: str) -> list[list[int]]:
    """Each choice's tokens; as many as it had, since a stop string or a client that left ends an answer earlier."""
    engine, found = open_engine(model, settings, Shared(settings.media)), []
    try:
        for number, choice in enumerate(choices):
            pictures = [Picture(name, shown[name]) for name in choice["pictures"]]
            ids, sampling = choice["prompt_token_ids"], Sampling(**choice["sampling"])
            ask = Ask(str(number), ids, pictures, sampling, choice["max_tokens"], adapter=adapter)
            made = [token async for step in engine.submit(ask) for token in step.tokens]
            found.append(made[: len(choice["token_ids"])])
    finally:
        engine.stop()
    return found
