"""The engine's place on Ray Serve: a replica that holds a model folder and answers requests as streams of text.

Words become token ids and pictures pixels here; the engine proper (batching.py) sees nothing else.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator

import torch
from ray import serve
from tokenizers.decoders import DecodeStream

from owl_model.answering import load
from pipelines.serving.batching import Batching, Picture, Room
from pipelines.serving.sampling import Sampling
from pipelines.serving.virtual import NoRoom


@serve.deployment
class Engine:
    def __init__(self, model: str, room: dict):
        self.owl, self.processor = load(model)
        self.engine = Batching(self.owl, self.processor.end_id, Room(**room))

    async def stream(self, messages: list[dict], pictures: list[bytes], options: dict) -> AsyncIterator[dict]:
        """Yields {"text": …} pieces, then {"usage": …, "finish": "stop" | "length"}, or {"refused": …} alone."""
        try:
            encoded = self.processor.encode(messages, prompt=True)
            if encoded.images != len(pictures):
                raise ValueError(f"the conversation shows {encoded.images} pictures, but {len(pictures)} were given")
            shown = await asyncio.to_thread(lambda: [self.picture(data) for data in pictures])
        except ValueError as error:
            yield {"refused": str(error)}
            return
        length = len(encoded.ids)
        room = getattr(self.owl.config.text_config, "max_position_embeddings", 1 << 30) - length
        if room < 1:
            yield {"refused": f"the conversation takes {length} tokens, more than the model can hold"}
            return
        longest = min(options["max_new_tokens"], room)
        sampling = Sampling(**{name: value for name, value in options.items() if name != "max_new_tokens"})
        words, made, finish = Words(self.processor.tokenizer), 0, "stop"
        try:
            async for step in self.engine.submit(uuid.uuid4().hex, encoded.ids, shown, sampling, longest):
                made += len(step.tokens)
                finish = step.finish or finish
                if text := words.after(step.tokens):
                    yield {"text": text}
        except NoRoom as error:
            yield {"refused": str(error)}
            return
        usage = {"prompt_tokens": length, "completion_tokens": made, "total_tokens": length + made}
        yield {"usage": usage, "finish": finish}

    def picture(self, data: bytes) -> Picture:
        """Raises ValueError where the bytes are no picture."""
        pixels = self.processor.image_processor.pixels(data)
        return Picture(hashlib.sha256(pixels.numpy().tobytes()).hexdigest(), pixels)

    def check_health(self) -> None:
        if not torch.isfinite(self.owl.lm_head.weight[0]).all():
            raise RuntimeError("the model's weights are not finite")
        if not self.engine.manager.is_running():
            raise RuntimeError("the engine has stopped")


class Words:
    """Text of tokens as they come: a piece for as many as make whole characters."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer.backend_tokenizer
        self.decoder = DecodeStream(skip_special_tokens=True)

    def after(self, tokens: list[int]) -> str:
        return "".join(self.decoder.step(self.tokenizer, token) or "" for token in tokens)
