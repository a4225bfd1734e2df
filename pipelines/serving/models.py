"""What an endpoint serves: a model folder and its LoRA adapters, known by name, and by what they hold."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from owl_model import OwlConfig, OwlProcessor
from pipelines import storage
from pipelines.serving.api import Refusal
from pipelines.serving.engine import Ask
from pipelines.serving.options import Serving, longest_of


class Models:
    """Of a gateway, which holds no weights: configuration, tokenizer and preprocessing alone."""

    def __init__(self, folder: str, settings: Serving):
        self.folder, self.settings = folder, settings
        self.config = OwlConfig.from_pretrained(folder)
        self.processor = OwlProcessor.from_pretrained(folder)
        self.longest = longest_of(self.config, settings.room)
        """Tokens that prompt and answer may have together."""
        self.longest_word = max(map(len, self.processor.tokenizer.get_vocab()))
        """Characters that one token may stand for."""

    def names(self) -> list[str]:
        root = self.settings.adapters
        found = sorted(path.parent.name for path in Path(root).glob("*/adapter_config.json")) if root else []
        return [self.settings.name, *(name for name in found if name != self.settings.name)]

    def refuse_unknown(self, name: str) -> None:
        names = self.names()
        if name not in names:
            known = ", ".join(repr(one) for one in names[:20])
            raise Refusal(404, f"there is no model {name[:100]!r} here; there is {known}", "model", "model_not_found")

    def adapter(self, name: str) -> str:
        """FOLDER@DIGEST of the adapter of that name; "" for the model itself."""
        folder = f"{self.settings.adapters}/{name}"
        return "" if name == self.settings.name else f"{folder}@{digest(folder)}"

    def receipt(self, model: str, asks: list[Ask], answers: list[list[int]]) -> dict[str, Any]:
        """What makes an answer repeatable (`owl chat --replay`)."""
        adapter = self.adapter(model)
        return {
            "model": digest(self.folder),
            "adapter": adapter.rpartition("@")[2] or None,
            "template": hashlib.sha256(json.dumps(self.processor.template, sort_keys=True).encode()).hexdigest(),
            "precision": self.settings.precision,
            "choices": [
                {
                    "prompt_token_ids": ask.ids,
                    "pictures": [picture.digest for picture in ask.pictures],
                    "sampling": ask.sampling.model_dump(),
                    "max_tokens": ask.longest,
                    "token_ids": answer,
                }
                for ask, answer in zip(asks, answers, strict=True)
            ],
        }


def digest(folder: str) -> str:
    """Of what decides answers: weights, configuration and tokenizer, by name and content. Files are read anew when
    they have changed."""
    files = sorted(path for path in Path(folder).iterdir() if path.suffix in (".safetensors", ".json", ".model"))
    return digest_of(tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files))


@lru_cache(maxsize=64)
def digest_of(files: tuple[tuple[str, int, int], ...]) -> str:
    whole = hashlib.sha256()
    for path, _, _ in files:
        whole.update(f"{Path(path).name} {storage.sha256(path)}\n".encode())
    return whole.hexdigest()
