"""Tokens of an answer → its text, a whole character at a time, up to a stop string."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from tokenizers.decoders import DecodeStream
from transformers.convert_slow_tokenizer import bytes_to_unicode


class Written(NamedTuple):
    text: str
    told: list[dict] | None
    """OpenAI's logprobs entries of the tokens that came with it, where asked for."""
    stopped: bool
    """A stop string was met: nothing follows."""


class Writer:
    """One answer's text. Holds back as many characters as a stop string may still begin in."""

    def __init__(self, tokenizer: Any, stops: list[str], logprobs: bool = False):
        self.tokenizer, self.stops, self.logprobs = tokenizer, stops, logprobs
        self.byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.hidden = max((len(stop) for stop in stops), default=1) - 1
        self.held, self.length, self.began = "", 0, False

    def write(self, tokens: list[int], told: list[dict]) -> Written:
        """What may be told after these tokens."""
        entries = [self.entry(token, fact) for token, fact in zip(tokens, told, strict=True)] if self.logprobs else None
        text = "".join(self.decoder.step(self.tokenizer.backend_tokenizer, token) or "" for token in tokens)
        if not self.began:  # templates leave the space before an answer to its first token
            text = text.lstrip()
            self.began = bool(text)
        self.held += text
        cuts = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if cuts:
            return Written(self.held[: min(cuts)], entries, True)
        ready = max(0, len(self.held) - self.hidden)
        out, self.held = self.held[:ready], self.held[ready:]
        self.length += len(out)
        return Written(out, entries, False)

    def rest(self) -> str:
        """What was held back, once no token follows."""
        out, self.held = self.held, ""
        return out

    def entry(self, token: int, fact: dict) -> dict:
        top = [{**self.named(other), "logprob": floor(value)} for other, value in fact["top"]]
        return {**self.named(token), "logprob": floor(fact["logprob"]), "top_logprobs": top, "offset": self.length}

    def named(self, token: int) -> dict:
        written = bytes_of(self.tokenizer.convert_ids_to_tokens(token), self.byte_level)
        return {"token": written.decode("utf-8", "replace"), "bytes": list(written)}


def floor(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, -9999.0)


BYTE = re.compile(r"<0x([0-9A-F]{2})>")
CHARACTERS = {character: byte for byte, character in bytes_to_unicode().items()}


def bytes_of(piece: str, byte_level: bool) -> bytes:
    """What a token of a vocabulary stands for: of one in GPT-2's characters for bytes, or else in SentencePiece's "▁"
    for a space and <0x…> for a byte."""
    if byte_level and all(character in CHARACTERS for character in piece):
        return bytes(CHARACTERS[character] for character in piece)
    found = BYTE.fullmatch(piece)
    return bytes([int(found[1], 16)]) if found else piece.replace("▁", " ").encode()
