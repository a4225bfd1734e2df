"""The built-in engine: transformers' continuous batching, made to see pictures (virtual.py), to choose each request's
tokens its own way (sampling.py), and to be quick on a CPU (attention.py).

It sees token ids and pixels only. Requests join and leave the running batch at any token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from owl_model import OwlForConditionalGeneration
from owl_model.adaptive import sort_rows
from pipelines.serving import attention
from pipelines.serving.room import Room
from pipelines.serving.sampling import Choice, Sampling
from pipelines.serving.virtual import PictureIds
from pipelines.settings import OwlError


class Decoder(PreTrainedModel, GenerationMixin):
    """An Owl's language model by itself: token ids in, logits out, with ids above the vocabulary for pictures."""

    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, owl: OwlForConditionalGeneration, pictures: PictureIds):
        super().__init__(owl.config.text_config)
        self.model, self.lm_head, self.pictures = owl.model.language_model, owl.lm_head, pictures
        self.adaptive = owl.config.modality_adaptive

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values; see attention.py."""
        return torch.float32 if self.device.type == "cpu" else super().dtype

    def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor | int = 0, **kwargs) -> CausalLMOutput:
        """[1, L] → logits [1, L', V]"""
        if self.adaptive:
            kwargs["rows"] = sort_rows(input_ids >= self.pictures.first)
        hidden = self.model(inputs_embeds=self.pictures(input_ids), **kwargs).last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutput(logits=self.lm_head(hidden[:, keep]))


class Picture(NamedTuple):
    digest: str
    """Of pixels and of how they were made: what is equal here is one picture."""
    pixels: torch.Tensor
    """[3, S, S]"""


class Step(NamedTuple):
    """What came of a step for a request."""

    tokens: list[int]
    told: list[dict]
    """What was asked to be told of these tokens' probabilities."""
    finish: str | None
    """"stop" or "length" with the last tokens."""


class Batching:
    """The engine. Made and used on one event loop; it computes in a thread of its own."""

    def __init__(self, owl: OwlForConditionalGeneration, end: int, room: Room, grammars=None):
        """``end`` is the token that closes an answer. Raises OwlError for a model with attention of its own."""
        text = owl.config.text_config
        if not getattr(owl.model.language_model, "_supports_attention_backend", False):
            raise OwlError(f"{text.model_type} brings its own attention, which cannot be batched continuously")
        self.owl, self.end = owl.eval(), end
        words = owl.get_input_embeddings()
        self.pictures = PictureIds(words, owl.config.visual_tokens, room.pictures)
        self.decoder = Decoder(owl, self.pictures).eval()
        settings = ContinuousBatchingConfig(
            page_size=room.page,
            num_blocks=room.tokens // room.page,
            max_batch_tokens=room.batch_tokens,
            max_requests_per_batch=room.requests,
            use_async_batching=False,
        )
        plain = GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=0)
        self.decoder.set_attn_implementation("sdpa")
        self.manager = self.decoder.init_continuous_batching(
            generation_config=plain, continuous_batching_config=settings
        )
        if self.decoder.device.type == "cpu":
            self.decoder.set_attn_implementation(attention.register())
        self.choice = Choice([owl.config.image_token_id, owl.config.video_token_id], end, grammars)
        steps = self.manager.logit_processor
        steps.logits_processor.append(self.choice)
        steps.tensors_required += 1
        steps.do_processing = True
        steps._retrieve_processors_kwargs()
        self.manager.start()

    async def submit(
        self, name: str, ids: Sequence[int], pictures: Sequence[Picture], sampling: Sampling, longest: int
    ) -> AsyncIterator[Step]:
        """Answers ``ids``, in which each picture stands as a run of the placeholder, until the answer ends or has
        ``longest`` tokens. Whoever stops reading cancels it. Raises NoRoom, and RuntimeError where the engine fails."""
        taken = [await asyncio.to_thread(self.pictures.take, p.digest, partial(self.encode, p)) for p in pictures]
        arrived: asyncio.Queue = asyncio.Queue()
        self.manager.register_result_handler(name, arrived.put_nowait)
        self.manager.add_request(
            self.with_pictures(ids, taken),
            request_id=name,
            max_new_tokens=longest,
            streaming=True,
            eos_token_id=self.end,
            sampling=sampling,
        )
        told, over = 0, False
        try:
            while not over:
                output = await arrived.get()
                if output.error:
                    raise RuntimeError(output.error)
                over = output.is_finished()
                tokens = output.generated_tokens[told:]
                facts = self.choice.told.get(name, [])[told : told + len(tokens)]
                told += len(tokens)
                finish = None
                if over:
                    finish = "stop" if tokens and tokens[-1] == self.end else "length"
                yield Step(tokens, facts, finish)
        finally:
            if not over:
                await self.cancel(name)
            self.choice.forget(name)
            for some in taken:
                self.pictures.let_go(some)

    async def cancel(self, name: str) -> None:
        """Takes a request out, and waits until no step can still read its pictures: their room may be given away then,
        and keys and values made of another picture's would be kept under these ids."""
        self.manager.cancel_request(name)
        scheduler = self.manager.batch_processor.scheduler
        while name in scheduler.active_requests or name in scheduler.waiting_requests:
            await asyncio.sleep(0.005)
        self.manager.output_router.result_handlers.pop(name, None)

    @torch.no_grad()
    def encode(self, picture: Picture) -> torch.Tensor:
        """[tokens, D]"""
        return self.owl.get_image_features(picture.pixels.unsqueeze(0).to(self.owl.device)).pooler_output[0]

    def with_pictures(self, ids: Sequence[int], taken: Sequence[list[int]]) -> list[int]:
        """Placeholders replaced by the pictures' own ids, in reading order."""
        coming = iter([token for some in taken for token in some])
        return [next(coming) if token == self.owl.config.image_token_id else token for token in ids]

    def stats(self) -> dict[str, int]:
        scheduler = self.manager.batch_processor.scheduler if self.manager.batch_processor else None
        return {
            "running": len(scheduler.active_requests) if scheduler else 0,
            "waiting": (len(scheduler.waiting_requests) if scheduler else 0) + self.manager.input_queue.qsize(),
            "pictures_encoded": self.pictures.encoded,
            "pictures_known": self.pictures.known,
        }

    def stop(self) -> None:
        self.manager.stop(block=True)
