"""What an engine is to the gateway: token ids and pixels in, a stream of tokens out.

The built-in one is batching.py. An engine is asked where it runs, in the gateway's own process, or, on Ray Serve,
through serve.py's `Replicas`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import NamedTuple, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field


class Sampling(BaseModel):
    """One request's way of choosing tokens. The same values give the same answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(default=0.0, ge=0, le=2)
    """0 takes the likeliest token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 considers all tokens."""
    seed: int = 0
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    """How many of the likeliest tokens are told at each place, beside the one taken; None tells nothing."""
    schema_: str = ""
    """A JSON schema, as JSON, that the answer keeps to; "" allows all."""
    ignore_end: bool = False
    """Never ends before the longest."""


class Picture(NamedTuple):
    digest: str
    """Of the pixels: what is equal here is one picture."""
    pixels: np.ndarray
    """[3, S, S]; a video's frames [T, 3, S, S]"""


class Ask(NamedTuple):
    """One answer to be made."""

    name: str
    ids: list[int]
    """The prompt; each picture stands in it as a run of the placeholder."""
    pictures: list[Picture]
    sampling: Sampling
    longest: int
    salt: str = ""
    """Keys and values of a prompt are shared among asks of the same salt only."""
    adapter: str = ""
    """A LoRA adapter's folder; "" for the model itself."""


class Step(NamedTuple):
    """What came since the last one."""

    tokens: list[int]
    told: list[dict]
    """What was asked to be told of these tokens: {"logprob", "top": [(token, logprob)]} for each."""
    finish: str | None
    """"stop" or "length" with the last tokens."""
    cached: int = 0
    """Tokens of the prompt whose keys and values were there already; told with the first."""


class Busy(RuntimeError):
    """The engine holds as much as it can; later it will not."""


class Unfit(ValueError):
    """The engine cannot answer this request, now or later."""


class Died(RuntimeError):
    """The engine went away in the midst of an answer."""


class Engine(Protocol):
    def submit(self, ask: Ask) -> AsyncGenerator[Step, None]:
        """The answer's tokens as they come. Whoever closes the stream cancels the rest. Raises Busy, Unfit or Died."""
        ...

    async def looked(self, ask: Ask, answer: list[int]) -> list[np.ndarray]:
        """For each picture [rows, columns] of where the answer's tokens looked, summing to 1. Raises Unfit."""
        ...

    async def stats(self) -> dict[str, float]:
        """running, waiting, cache (a share), and counts since the start: pictures_encoded, pictures_known,
        prompt_tokens, cached_tokens."""
        ...

    async def check(self) -> None:
        """Raises RuntimeError where it cannot answer any more."""
        ...

    async def drain(self) -> None:
        """Ends when all that was submitted has been answered."""
        ...

    def stop(self) -> None:
        """Ends it now."""
        ...
