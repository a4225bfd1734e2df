"""The engine: a model folder in an actor, answering as a stream of text.

Each request is a `generate` of its own in a thread; a client that goes away stops it at the next token.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator

import torch
from ray import serve
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from owl_model.answering import generation_config, load, on_device, prompt_inputs


class Cancelled(StoppingCriteria):
    """Ends a generation from outside."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


@serve.deployment
class Engine:
    def __init__(self, model: str):
        self.owl, self.processor = load(model)

    async def stream(self, messages: list[dict], pictures: list[bytes], options: dict) -> AsyncIterator[dict]:
        """Yields {"text": …} pieces, then {"usage": …, "finish": "stop" | "length"}, or {"refused": …} alone."""
        try:
            inputs = prompt_inputs(self.processor, [messages], [pictures])
        except ValueError as error:
            yield {"refused": str(error)}
            return
        inputs = on_device(self.owl, inputs)
        length = inputs["input_ids"].shape[1]
        room = getattr(self.owl.config.text_config, "max_position_embeddings", 1 << 30) - length
        if room < 1:
            yield {"refused": f"the conversation takes {length} tokens, more than the model can hold"}
            return
        options = {**options, "max_new_tokens": min(options["max_new_tokens"], room)}
        cancelled, made = Cancelled(), Counted(self.processor.tokenizer)
        thread = threading.Thread(target=self.generate, args=(inputs, options, cancelled, made), daemon=True)
        thread.start()
        try:
            while True:
                try:
                    piece = await asyncio.to_thread(made.text_queue.get, True, 0.5)
                except queue.Empty:
                    continue
                if piece is made.stop_signal:
                    break
                if piece:
                    yield {"text": piece}
        finally:
            cancelled.event.set()
        finish = "length" if made.tokens >= options["max_new_tokens"] else "stop"
        usage = {"prompt_tokens": length, "completion_tokens": made.tokens, "total_tokens": length + made.tokens}
        yield {"usage": usage, "finish": finish}

    def generate(self, inputs: dict, options: dict, cancelled: Cancelled, made: Counted) -> None:
        seed = options.pop("seed", None)
        if seed is not None:
            torch.manual_seed(seed)
        try:
            self.owl.generate(
                **inputs,
                generation_config=generation_config(self.owl, self.processor, **options),
                streamer=made,
                stopping_criteria=StoppingCriteriaList([cancelled]),
            )
        finally:
            made.end()

    def check_health(self) -> None:
        if not torch.isfinite(self.owl.lm_head.weight[0]).all():
            raise RuntimeError("the model's weights are not finite")


class Counted(TextIteratorStreamer):
    """A text streamer that counts tokens and may be ended twice."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens = -1  # the prompt comes first, as one piece
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += 1
        super().put(value)

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            super().end()
