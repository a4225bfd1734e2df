"""OpenAI's types, as far as the endpoint speaks them: requests, what answers are put into, and errors.

An unknown field is refused by its name, not ignored: an answer that disregards what was asked is a wrong answer.
Fields that OpenAI does not have are named as in vLLM where it has them.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, RootModel

MAX_CHOICES = 16
MAX_ANSWER = 65_536
MAX_MESSAGES = 1024


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def whole(value: Any) -> Any:
    """JSON knows one kind of number: 7.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(whole)
Longest = Annotated[int, Field(ge=1, le=MAX_ANSWER), WHOLE]
Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), WHOLE]
TopK = Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE]
Likeliest = Annotated[int, Field(ge=0, le=20), WHOLE]
Id = Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE]


# --- requests --------------------------------------------------------------------------------------------------------


class ImageURL(Strict):
    url: str = Field(min_length=1)
    """A data: URI, an address of an allowed host, or the id that an upload gave."""
    detail: Literal["auto", "low", "high"] = "auto"


class VideoURL(Strict):
    url: str = Field(min_length=1)
    """data:video/jpeg;base64, and the frames' base64, with commas between."""


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL


class VideoPart(Strict):
    type: Literal["video_url"]
    video_url: VideoURL


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None


class StreamOptions(Strict):
    include_usage: bool = False


class Schema(Strict):
    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]

    @property
    def held_to(self) -> dict[str, Any] | None:
        """The JSON schema that the answer keeps to."""
        return None


class ObjectFormat(Strict):
    type: Literal["json_object"]

    @property
    def held_to(self) -> dict[str, Any] | None:
        return {"type": "object"}


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: Schema

    @property
    def held_to(self) -> dict[str, Any] | None:
        return self.json_schema.schema_


Format = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Words = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Id], Field(min_length=1)]


class Asking(Strict):
    """What chat and plain completions share."""

    model: str
    max_tokens: Longest | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: TopK = 0
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    n: Choices = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    ignore_eos: bool = False
    """Writes on until max_tokens: for benchmarks."""
    cache_salt: str | None = Field(default=None, max_length=256)
    """Requests share what is cached of their prompts only with those of the same key and the same salt."""
    receipt: bool = False
    """Asks for what makes the answer repeatable, under "owl"."""

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatRequest(Asking):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Longest | None = None
    logprobs: bool = False
    top_logprobs: Likeliest | None = None
    response_format: Format | None = None
    looked: bool = False
    """Asks where in its pictures the answer looked, under "owl"."""

    @property
    def told(self) -> int | None:
        """How many of the likeliest tokens are told at each place; None tells nothing."""
        return (self.top_logprobs or 0) if self.logprobs or self.top_logprobs is not None else None

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Asking):
    prompt: (
        Words
        | Annotated[list[Words], Field(min_length=1, max_length=128)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=128)]
    )
    logprobs: Likeliest | None = None
    echo: Literal[False] = False

    @property
    def longest(self) -> int | None:
        return self.max_tokens or 16  # OpenAI's default

    @property
    def prompts(self) -> list[str | list[int]]:
        many = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if many else [self.prompt]  # type: ignore[arg-type,list-item]


class TokenizeText(Strict):
    model: str
    prompt: str


class TokenizeMessages(Strict):
    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)


class TokenizeRequest(RootModel[TokenizeText | TokenizeMessages]):
    """A text, or a conversation."""


# --- answers ---------------------------------------------------------------------------------------------------------


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class Upload(BaseModel):
    """As OpenAI's FileObject; the id is made of the picture's content."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["vision"] = "vision"


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class Refusal(Exception):
    """A request is not answered: the status, OpenAI's error object, and when to try again."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, wait: float = 0):
        super().__init__(status, message, param, code, wait)
        self.status, self.message, self.param, self.code, self.wait = status, message, param, code, wait

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(max(1, round(self.wait)))} if self.wait else {}


KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class Shape:
    """The bodies of one answer: whole, and in chunks."""

    def __init__(self, model: str, chat: bool):
        self.chat = chat
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.head = {"id": self.id, "created": int(time.time()), "model": model}

    def choice(self, index: int, text: str, finish: str | None, logprobs: list[dict] | None) -> dict[str, Any]:
        shown: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **shown, "finish_reason": finish, "logprobs": self.logprobs(logprobs)}

    def whole(self, choices: list[dict], usage: dict, more: dict) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": usage, **more}

    def chunk(self, index: int, text: str | None, finish: str | None, logprobs: list[dict] | None, first=False) -> dict:
        if self.chat:
            delta = {"role": "assistant"} if first else {}
            shown: dict[str, Any] = {"delta": delta if text is None else {**delta, "content": text}}
        else:
            shown = {"text": text or ""}
        choice = {"index": index, **shown, "finish_reason": finish, "logprobs": self.logprobs(logprobs)}
        return {**self.head, "object": self.kind_of_chunk, "choices": [choice]}

    def last(self, usage: dict | None, more: dict) -> dict[str, Any]:
        return {**self.head, "object": self.kind_of_chunk, "choices": [], "usage": usage, **more}

    @property
    def kind_of_chunk(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def logprobs(self, told: list[dict] | None) -> dict[str, Any] | None:
        if told is None:
            return None
        if self.chat:
            return {"content": told, "refusal": None}
        return {
            "tokens": [entry["token"] for entry in told],
            "token_logprobs": [entry["logprob"] for entry in told],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in told],
            "text_offset": [entry["offset"] for entry in told],
        }


def usage_of(prompt: int, answers: int, cached: int) -> dict[str, Any]:
    details = {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers, **details}
