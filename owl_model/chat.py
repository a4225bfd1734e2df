"""Messages → token ids and labels: the one template of training, evaluation and serving.

A conversation is a list of messages in OpenAI's shape: ``{"role": "user" | "assistant" | "system", "content": …}``
with content a string or a list of parts, ``{"type": "text", "text": …}``, ``{"type": "image"}`` or
``{"type": "video"}``.

The text is cut at pictures and around answers, and each piece is tokenized by itself; so the ids of a prompt do not
depend on whether an answer follows, and training sees exactly what serving sends. Labels are the answers' tokens,
each answer's end included, and -100 everywhere else. Where this departs from the authors' two ways of tokenizing is
told in docs/models.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

IGNORE = -100
MEDIA = ("image", "video")


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a conversation is written. It is saved with the processor, so a model folder holds its own."""

    system: str = ""
    """Opens the conversation, unless it brings a system message of its own."""
    before_system: str = ""
    """Stands before the system message, where there is one."""
    after_system: str = ""
    """Stands after the system message, where there is one."""
    user: str = "\nHuman: "
    """Opens the user's turn."""
    each_part: bool = True
    """Whether ``user`` also stands before every further part of the turn, pictures included (mPLUG-Owl)."""
    after_media: str = ""
    """Stands after each picture or video."""
    assistant: str = "\nAI: "
    """Stands before each answer."""
    end: str = ""
    """The token that closes an answer; empty for the tokenizer's end of sequence."""


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
USER, ASSISTANT = "USER: ", " ASSISTANT:"

TEMPLATES = {
    "owl1": Template(
        system="The following is a conversation between a curious human and AI assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions."
    ),
    "owl2": Template(user=USER, each_part=False, assistant=ASSISTANT),
    "owl2_finetune": Template(
        system=VICUNA, after_system=" ", user=USER, each_part=False, after_media="\n", assistant=ASSISTANT
    ),
    "chatml": Template(
        before_system="<|im_start|>system\n",
        after_system="<|im_end|>\n",
        user="<|im_start|>user\n",
        each_part=False,
        assistant="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
    ),
    "plain": Template(),
}
"""owl1 and owl2: the authors' templates at inference; owl2_finetune: that of their fine-tuning scripts (``--version
v1``); chatml: Qwen's; plain: mPLUG-Owl's turns without a system message."""


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens: ``ids`` and ``labels`` of equal length, and how many pictures and videos it shows."""

    ids: list[int]
    labels: list[int]
    images: int
    videos: int = 0


def parts_of(message: dict) -> list[dict]:
    """A message's content as a list of parts. Raises ValueError on an unknown role or part."""
    if message["role"] not in ("system", "user", "assistant"):
        raise ValueError(f"unknown role {message['role']!r}")
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts:
        if part["type"] not in ("text", *MEDIA):
            raise ValueError(f"unknown content type {part['type']!r}")
        if part["type"] in MEDIA and message["role"] != "user":
            raise ValueError(f"a picture in a message of the {message['role']}")
    return parts


def segments(messages: Iterable[dict], template: Template, prompt: bool) -> Iterator[tuple[str, str]]:
    """("text" | "image" | "video" | "answer", text) pieces in reading order; ``prompt`` opens the next answer."""
    messages = list(messages)
    if template.system and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": template.system})
    written = ""
    for message in messages:
        parts = parts_of(message)
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        if message["role"] == "system":
            written += template.before_system + text + template.after_system
        elif message["role"] == "assistant":
            yield "text", written + template.assistant
            yield "answer", text
            written = ""
        else:
            for index, part in enumerate(parts):
                if template.each_part or index == 0:
                    written += template.user
                if part["type"] in MEDIA:
                    yield "text", written
                    yield part["type"], ""
                    written = template.after_media
                else:
                    written += part["text"]
    if prompt:
        written += template.assistant
    if written:
        yield "text", written


def harmless(messages: Iterable[dict], control: Collection[str]) -> list[dict]:
    """The messages with every control token's text in their contents broken by a zero-width space: who writes "</s>"
    in a question does not end it. Raises ValueError as `parts_of`."""

    def broken(text: str) -> str:
        for token in control:
            if token in text:
                text = text.replace(token, f"{token[0]}\u200b{token[1:]}")
        return text

    cleaned = []
    for message in messages:
        parts = [
            part if part["type"] in MEDIA else {**part, "text": broken(part["text"])} for part in parts_of(message)
        ]
        cleaned.append({**message, "content": parts})
    return cleaned


def end_of_answer(tokenizer, template: Template) -> int:
    """The id of the token that closes an answer. Raises ValueError where the tokenizer has no such single token."""
    ids = tokenizer(template.end, add_special_tokens=False)["input_ids"] if template.end else [tokenizer.eos_token_id]
    if len(ids) != 1 or ids[0] is None or (template.end and ids[0] == tokenizer.unk_token_id):
        raise ValueError(f"the template ends answers with {template.end!r}, which is not one token here: {ids}")
    return ids[0]


def encode(
    messages: Iterable[dict],
    tokenizer,
    template: Template,
    *,
    media_ids: dict[str, int],
    visual_tokens: int,
    prompt: bool = False,
) -> Encoded:
    """A conversation as token ids; ``media_ids`` are the placeholders of "image" and "video". ``prompt`` ends it
    where the assistant would speak."""
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    labels = [IGNORE] * len(ids)
    shown = dict.fromkeys(MEDIA, 0)
    for kind, text in segments(harmless(messages, tokenizer.all_special_tokens), template, prompt):
        if kind in MEDIA:
            shown[kind] += 1
            piece = [media_ids[kind]] * visual_tokens
        else:
            piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        if kind == "answer":
            piece = [*piece, end_of_answer(tokenizer, template)]
        ids += piece
        labels += piece if kind == "answer" else [IGNORE] * len(piece)
    return Encoded(ids, labels, shown["image"], shown["video"])
