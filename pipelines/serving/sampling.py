"""How one request's next token is chosen, in a batch with others that choose otherwise.

transformers' continuous batching takes the likeliest token of every row. What makes rows differ happens before: each
row's scores are masked, penalized and shifted by noise that depends on its seed and position alone (Gumbel-max: the
largest of log p + noise is a sample of p; Maddison et al. 2014, section 2), so that a request's answer is the same
alone and in any batch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from pipelines.serving.engine import Sampling, Unfit


class Choice(ContinuousBatchingLogitsProcessor):
    """Prepares each row's scores by its request's Sampling, so that the largest is the token to take."""

    supported_kwargs = {"sampling": Sampling}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, forbidden: list[int], end: int, grammars: Any = None):
        """``end`` closes an answer. ``forbidden`` tokens, such as pictures' placeholders, are never written.
        ``grammars`` is llguidance's tokenizer; None where there is none."""
        self.forbidden = torch.tensor(forbidden, dtype=torch.long)
        self.end, self.grammars = end, grammars
        self.rows: list[tuple[str, Sampling, list[int]]] = []
        self.told: dict[str, list[dict]] = {}
        """Request → for each of its tokens {"logprob", "top": [(token, logprob)]}, where asked for."""
        self.matchers: dict[str, tuple[Any, int]] = {}

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list) -> torch.Tensor:
        self.rows = [
            (r.state.request_id, r.state.logit_processor_kwargs["sampling"], written(r.state))
            for r in requests_with_new_token
        ]
        return torch.zeros(len(self.rows), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """[R, V] → [R, V]"""
        if self.forbidden.device != scores.device:
            self.forbidden = self.forbidden.to(scores.device)
        scores[:, self.forbidden] = -torch.inf
        for row, (request, sampling, made) in enumerate(self.rows):
            raw = scores[row].log_softmax(-1) if sampling.logprobs is not None else None
            self.shape(scores[row], request, sampling, made)
            if raw is not None:
                self.tell(request, raw, int(scores[row].argmax()), sampling.logprobs or 0)
        return scores

    def shape(self, row: torch.Tensor, request: str, sampling: Sampling, made: list[int]) -> None:
        """One row's scores [V], in place."""
        if made and (sampling.presence_penalty or sampling.frequency_penalty):
            tokens, counts = torch.tensor(made, device=row.device).unique(return_counts=True)
            row[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        if sampling.schema_:
            self.mask(row, request, grammar_of(sampling.schema_), made)
        if sampling.ignore_end:
            row[self.end] = -torch.inf
        if sampling.temperature:
            row /= sampling.temperature
            keep_likeliest(row, sampling.top_k, sampling.top_p)
            row += gumbel(len(row), sampling.seed, len(made)).to(row.device)

    def mask(self, row: torch.Tensor, request: str, grammar: str, made: list[int]) -> None:
        """Leaves what the grammar allows next."""
        from llguidance import LLMatcher

        matcher, seen = self.matchers.get(request) or (LLMatcher(self.grammars, grammar), 0)
        if made[seen:]:
            matcher.consume_tokens(made[seen:])
        self.matchers[request] = (matcher, len(made))
        if matcher.is_stopped():  # nothing can follow
            row[:] = -torch.inf
            row[self.end] = 0.0
        else:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
            row[~torch.from_numpy(bits[: len(row)].astype(bool)).to(row.device)] = -torch.inf

    def tell(self, request: str, raw: torch.Tensor, token: int, count: int) -> None:
        values, tokens = raw.topk(count)
        top = list(zip(tokens.tolist(), values.tolist(), strict=True))
        self.told.setdefault(request, []).append({"logprob": float(raw[token]), "top": top})

    def forget(self, request: str) -> None:
        self.told.pop(request, None)
        self.matchers.pop(request, None)


def written(state) -> list[int]:
    """The tokens that a request's answer has so far; a request that gave its place to others has some in its prompt."""
    before = state.initial_tokens[state._true_initial_tokens :] if state._true_initial_tokens else []
    return [*before, *state.generated_tokens]


def keep_likeliest(row: torch.Tensor, top_k: int, top_p: float) -> None:
    """Rules out all but the ``top_k`` likeliest tokens, and of those all beyond a probability of ``top_p``."""
    if 0 < top_k < len(row):
        row[row < row.topk(top_k).values[-1]] = -torch.inf
    if top_p < 1:
        ordered, places = row.sort(descending=True)
        mass = ordered.softmax(-1).cumsum(-1)
        beyond = mass - ordered.softmax(-1) >= top_p  # the token that crosses the mark stays
        row[places[beyond]] = -torch.inf


def gumbel(size: int, seed: int, position: int) -> torch.Tensor:
    """[size] of Gumbel noise: a pure function of seed and position."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + position) % 2**63)
    uniform = torch.rand(size, generator=generator).clamp_(1e-20, 1 - 1e-7)
    return -torch.log(-torch.log(uniform))


@lru_cache(maxsize=256)
def grammar_of(schema: str) -> str:
    """llguidance's grammar of a JSON schema, given as JSON. Raises Unfit where it cannot be held to."""
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(schema)
        problem = LLMatcher.validate_grammar(grammar)
    except (ValueError, TypeError) as error:
        problem = str(error)
    if problem:
        raise Unfit(f"response_format: this JSON schema cannot be held to: {str(problem)[:200]}")
    return grammar
