"""Messages → token ids and labels: the one template of training, evaluation and serving.

A conversation is a list of messages in OpenAI's shape: ``{"role": "user" | "assistant" | "system", "content": …}``
with content a string or a list of parts, ``{"type": "text", "text": …}`` or ``{"type": "image"}``.

The text is cut at pictures and around answers, and each piece is tokenized by itself; so the ids of a prompt do not
depend on whether an answer follows, and training sees exactly what serving sends. Labels are the answers' tokens,
each answer's end of sequence included, and -100 everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a conversation is written. mPLUG-Owl's: fact sheet of the release, pipeline/interface.py."""

    system: str = ""
    """Opens the conversation, unless it brings a system message of its own."""
    user: str = "\nHuman: "
    """Stands before each part of the user's turn, pictures included."""
    assistant: str = "\nAI: "
    """Stands before each answer."""


TEMPLATES = {
    "owl1": Template(
        system="The following is a conversation between a curious human and AI assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions."
    ),
    "plain": Template(),
}


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens: ``ids`` and ``labels`` of equal length, and how many pictures it shows."""

    ids: list[int]
    labels: list[int]
    images: int


def parts_of(message: dict) -> list[dict]:
    """A message's content as a list of parts. Raises ValueError on an unknown role or part."""
    if message["role"] not in ("system", "user", "assistant"):
        raise ValueError(f"unknown role {message['role']!r}")
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts:
        if part["type"] not in ("text", "image"):
            raise ValueError(f"unknown content type {part['type']!r}")
        if part["type"] == "image" and message["role"] != "user":
            raise ValueError(f"a picture in a message of the {message['role']}")
    return parts


def segments(messages: Iterable[dict], template: Template, prompt: bool) -> Iterator[tuple[str, str]]:
    """("text" | "image" | "answer", text) pieces in reading order; ``prompt`` opens the next answer."""
    messages = list(messages)
    own_system = messages and messages[0]["role"] == "system"
    written = "" if own_system else template.system
    for message in messages:
        parts = parts_of(message)
        if message["role"] == "assistant":
            yield "text", written + template.assistant
            yield "answer", "".join(part["text"] for part in parts)
            written = ""
            continue
        for part in parts:
            if message["role"] == "user":
                written += template.user
            if part["type"] == "image":
                yield "text", written
                yield "image", ""
                written = ""
            else:
                written += part["text"]
    if prompt:
        written += template.assistant
    if written:
        yield "text", written


def encode(
    messages: Iterable[dict],
    tokenizer,
    template: Template,
    *,
    image_token_id: int,
    visual_tokens: int,
    prompt: bool = False,
    supervise_all: bool = False,
) -> Encoded:
    """A conversation as token ids. ``prompt`` ends it where the assistant would speak; ``supervise_all`` labels
    every word (language pretraining) instead of the answers alone."""
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    labels = [IGNORE] * len(ids)
    images = 0
    for kind, text in segments(messages, template, prompt):
        if kind == "image":
            images += 1
            piece = [image_token_id] * visual_tokens
        else:
            piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        if kind == "answer":
            piece = [*piece, tokenizer.eos_token_id]
        ids += piece
        supervised = kind == "answer" or (supervise_all and kind == "text")
        labels += piece if supervised else [IGNORE] * len(piece)
    return Encoded(ids, labels, images)
