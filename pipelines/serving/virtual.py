"""Pictures as token ids: how an engine that takes token ids alone sees pictures.

Every distinct picture owns as many ids above the vocabulary as it has visual tokens. An id means that picture for ever:
the engine keeps keys and values by ids, and an id that came to mean another picture would silently be answered from the
wrong ones. What is recycled is the room that embeddings take, behind the ids.

Ids at the far end stand for a prompt's first token in the company of a salt: they read like it, but keys and values
that follow from them are found again under the same salt only.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

from pipelines.serving.engine import Busy

LAST_ID = 2**31 - 1
"""Token ids are int32 inside the engine."""
SALTED = 1 << 24
"""So many salted ids, the last."""


def grown(table: torch.Tensor, number: int) -> torch.Tensor:
    """A table with room for ``number``, which holds what the old one did."""
    larger = table.new_zeros(max(64, 2 * (number + 1)))
    larger[: len(table)] = table
    return larger


class PictureIds(nn.Module):
    """A token embedding that also knows pictures. ``rooms`` pictures' embeddings are held at once; those of requests in
    flight are never given up, of the others the one that was not asked about for longest."""

    def __init__(self, words: nn.Embedding, tokens: int, rooms: int):
        super().__init__()
        self.words, self.tokens, self.first = words, tokens, words.num_embeddings
        self.held: torch.Tensor
        self.room_of: torch.Tensor
        self.meant: torch.Tensor
        shape = (rooms, tokens, words.embedding_dim)
        numbers = torch.zeros(0, dtype=torch.long, device=words.weight.device)
        self.register_buffer("held", words.weight.new_zeros(shape), persistent=False)
        self.register_buffer("room_of", numbers, persistent=False)
        self.numbers: dict[str, int] = {}
        """Digest → the picture's number, for ever."""
        self.rooms: OrderedDict[int, int] = OrderedDict()
        """Number → room, the one asked about last at the end."""
        self.free = list(range(rooms))
        self.users: dict[int, int] = {}
        self.salted: dict[tuple[str, int], int] = {}
        """Salt and token → the number of their id, for ever."""
        self.register_buffer("meant", numbers, persistent=False)
        self.lock = threading.Lock()
        self.encoded = self.known = 0

    @property
    def weight(self) -> torch.Tensor:
        return self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[…] ids → […, D]"""
        ids = self.plain(ids)
        embedded = self.words(ids.clamp(max=self.first - 1))
        shown = ids >= self.first
        if shown.any():
            place = ids[shown] - self.first
            number, offset = place // self.tokens, place % self.tokens
            embedded[shown] = self.held[self.room_of[number], offset]
        return embedded

    def plain(self, ids: torch.Tensor) -> torch.Tensor:
        """The same, with what salted ids stand for in their place."""
        salted = ids > LAST_ID - SALTED
        if salted.any():
            ids = ids.clone()
            ids[salted] = self.meant[LAST_ID - ids[salted].long()].to(ids.dtype)
        return ids

    def salt(self, salt: str, token: int) -> int:
        """The id that stands for ``token`` under ``salt``. Raises Busy."""
        with self.lock:
            number = self.salted.setdefault((salt, token), len(self.salted))
            if number >= SALTED:
                raise Busy("all salts are used up; the engine must start anew")
            if number >= len(self.meant):
                self.meant = grown(self.meant, number)
            self.meant[number] = token
            return LAST_ID - number

    def holds(self, digest: str) -> bool:
        return self.numbers.get(digest) in self.rooms

    def take(self, digest: str, encode: Callable[[], torch.Tensor]) -> list[int]:
        """The ids of a picture, whose embeddings [tokens, D] ``encode`` makes where they are not held. To be let go of
        once the request has ended. Raises Busy."""
        with self.lock:
            number = self.numbers.setdefault(digest, len(self.numbers))
            start = self.first + number * self.tokens
            if start + self.tokens > LAST_ID - SALTED:
                raise Busy("all token ids were given to pictures; the engine must start anew")
            self.users[number] = self.users.get(number, 0) + 1
            if number in self.rooms:
                self.rooms.move_to_end(number)
                self.known += 1
            else:
                try:
                    room = self.make_room()
                except Busy:
                    self.leave(number)
                    raise
                self.held[room] = encode()
                if number >= len(self.room_of):
                    self.room_of = grown(self.room_of, number)
                self.room_of[number] = room
                self.rooms[number] = room
                self.encoded += 1
            return list(range(start, start + self.tokens))

    def make_room(self) -> int:
        if self.free:
            return self.free.pop()
        for number in self.rooms:
            if number not in self.users:
                return self.rooms.pop(number)
        raise Busy(f"all {len(self.held)} rooms for pictures are taken by requests in flight")

    def let_go(self, ids: list[int]) -> None:
        """The request that took these ids has ended."""
        with self.lock:
            self.leave((ids[0] - self.first) // self.tokens)

    def leave(self, number: int) -> None:
        self.users[number] -= 1
        if not self.users[number]:
            del self.users[number]
