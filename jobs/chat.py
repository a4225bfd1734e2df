"""`owl chat`: a conversation in the terminal with a model folder or an endpoint."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from rich.console import Console

from pipelines.settings import OwlError

console = Console(highlight=False)

LONGEST = 256
"""Tokens of an answer in the terminal, at most."""


class Partner(Protocol):
    def reply(self, messages: list[dict], pictures: list[Path]) -> Iterator[str]:
        """Pieces of the answer. ``pictures`` are those of all image parts, in reading order."""
        ...


class Folder:
    """A model folder, loaded here; ``bits`` 8 or 4 quantizes its language model."""

    def __init__(self, folder: str, bits: int | None = None):
        from owl_model.answering import load

        if not (Path(folder) / "config.json").exists():
            raise OwlError(f"no model folder at {folder!r}: it has no config.json")
        try:
            self.owl, self.processor = load(folder, bits)
        except ValueError as error:
            raise OwlError(f"{folder}: {error}") from None

    def reply(self, messages: list[dict], pictures: list[Path]) -> Iterator[str]:
        from owl_model.answering import stream

        data = [path.read_bytes() for path in pictures]
        try:
            yield from stream(self.owl, self.processor, messages, data, max_new_tokens=LONGEST)
        except ValueError as error:
            raise OwlError(str(error)) from None


class Endpoint:
    """Any OpenAI-compatible endpoint."""

    def __init__(self, url: str, key: str):
        from openai import OpenAI, OpenAIError

        try:
            self.client = OpenAI(base_url=url, api_key=key, max_retries=0)
            self.model = next(iter(self.client.models.list())).id
        except OpenAIError as error:
            raise OwlError(f"no endpoint answers at {url}: {error}") from None

    def reply(self, messages: list[dict], pictures: list[Path]) -> Iterator[str]:
        coming = iter(pictures)

        def part(item: dict) -> dict:
            return item if item["type"] == "text" else {"type": "image_url", "image_url": {"url": uri(next(coming))}}

        sent = [
            {**m, "content": m["content"] if isinstance(m["content"], str) else [part(item) for item in m["content"]]}
            for m in messages
        ]
        for piece in self.client.chat.completions.create(
            model=self.model, messages=sent, max_tokens=LONGEST, temperature=0, stream=True
        ):
            if piece.choices:
                yield piece.choices[0].delta.content or ""


def uri(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def talk(partner: Partner, images: list[Path], question: str) -> None:
    """One question, or a conversation until the input ends."""
    messages: list[dict] = []
    shown = [existing(path) for path in images]
    waiting = len(shown)
    while True:
        try:
            text = question or console.input("[bold]you[/bold] ").strip()
        except EOFError:
            return
        if text.startswith("/image "):
            try:
                shown.append(existing(Path(text.removeprefix("/image ").strip())))
                waiting += 1
            except OwlError as error:
                console.print(error, markup=False)
            continue
        if text == "/new":
            messages, shown, waiting = [], [], 0
            continue
        if not text:
            continue
        messages.append({"role": "user", "content": [{"type": "image"}] * waiting + [{"type": "text", "text": text}]})
        waiting, said = 0, ""
        console.print("[bold]owl[/bold] ", end="")
        for piece in partner.reply(messages, shown):
            piece = piece if said else piece.lstrip()
            said += piece
            console.print(piece, end="", markup=False)
        console.print()
        messages.append({"role": "assistant", "content": said})
        if question:
            return


def existing(path: Path) -> Path:
    if not path.is_file():
        raise OwlError(f"there is no picture at {path}")
    return path
