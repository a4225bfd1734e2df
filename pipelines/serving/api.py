"""OpenAI's chat types, as far as the endpoint speaks them. An unknown field is refused by name, not ignored."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ImageURL(Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart | ImagePart]


class StreamOptions(Strict):
    include_usage: bool = False


class ChatRequest(Strict):
    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, le=4096)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=4096)
    temperature: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    user: str | None = None

    @property
    def longest(self) -> int:
        return self.max_completion_tokens or self.max_tokens or 64

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def completion_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def completion(request_id: str, model: str, text: str, usage: dict, finish: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    head = {"id": request_id, "object": "chat.completion", "created": int(time.time()), "model": model}
    return {**head, "choices": [choice], "usage": usage}


def chunk(request_id: str, model: str, delta: dict, finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
    head = {"id": request_id, "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
    return {**head, "choices": [choice]}


def error(message: str, kind: str = "invalid_request_error", param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


async def chained(first: dict, rest: AsyncIterator[dict]) -> AsyncIterator[dict]:
    yield first
    async for piece in rest:
        yield piece


async def until_stop(pieces, stops: list[str]) -> AsyncIterator[dict]:
    """Cuts the text at the first stop string. Holds back as many characters as a stop string may still begin in."""
    held, hidden = "", max((len(stop) for stop in stops), default=1) - 1
    stopped = False
    async for piece in pieces:
        if "text" not in piece:
            if held and not stopped:
                yield {"text": held}
            yield {**piece, "finish": "stop"} if stopped else piece
            return
        if stopped:
            continue
        held += piece["text"]
        cut = min((held.index(stop) for stop in stops if stop in held), default=None)
        if cut is not None:
            stopped, held = True, held[:cut]
            if held:
                yield {"text": held}
            held = ""
        elif len(held) > hidden:
            ready = len(held) - hidden
            yield {"text": held[:ready]}
            held = held[ready:]
