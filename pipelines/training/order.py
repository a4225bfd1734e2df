"""Which sample comes when: a pure function of (seed, position), the same for any number of workers.

Positions number the samples of all epochs, 0, 1, 2, …; step k of global batch B takes positions kB … kB + B - 1, and
rank r of R takes every R-th of them. Shuffling is in two levels, so that reading stays near-sequential: the order of
shards, and a permutation within each group of neighbouring shards. A mixture takes from several orders by turns, in
fixed shares of every CYCLE positions. The position of a run is one integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

CYCLE = 1000


class Place(NamedTuple):
    shard: int
    row: int
    epoch: int
    """How often this sample's dataset had been gone through before."""


class Ordered(Protocol):
    @property
    def seed(self) -> int: ...

    def at(self, position: int) -> Place: ...

    def seen(self, positions: int) -> np.ndarray:
        """[shards]: how many samples of each the first ``positions`` hold."""
        ...


def positions(step: int, size: int, rank: int = 0, world: int = 1) -> list[int]:
    """Of one rank's part of a global batch."""
    return list(range(step * size + rank, (step + 1) * size, world))


@dataclass(frozen=True)
class Order:
    """``rows[i]`` is how many samples shard i holds; ``group`` how many shards are shuffled into each other."""

    rows: tuple[int, ...]
    seed: int
    group: int = 4

    def __len__(self) -> int:
        return sum(self.rows)

    def at(self, position: int) -> Place:
        """An epoch's permutation is computed once and kept."""
        epoch, place = divmod(position, len(self))
        shards, rows = permutation(self, epoch)
        return Place(int(shards[place]), int(rows[place]), epoch)

    def seen(self, positions: int) -> np.ndarray:
        epochs, rest = divmod(positions, len(self))
        shards, _ = permutation(self, epochs)
        return epochs * np.array(self.rows) + np.bincount(shards[:rest], minlength=len(self.rows))


@dataclass(frozen=True)
class Mixture:
    """``shares[d]`` of every CYCLE positions are of ``orders[d]``. Shards are numbered one order after another."""

    orders: tuple[Order, ...]
    shares: tuple[int, ...]
    seed: int

    def at(self, position: int) -> Place:
        cycle, place = divmod(position, CYCLE)
        turns, numbers = turns_of(self, cycle)
        which = int(turns[place])
        found = self.orders[which].at(cycle * self.shares[which] + int(numbers[place]))
        return found._replace(shard=found.shard + sum(len(order.rows) for order in self.orders[:which]))

    def seen(self, positions: int) -> np.ndarray:
        cycles, rest = divmod(positions, CYCLE)
        begun = np.bincount(turns_of(self, cycles)[0][:rest], minlength=len(self.orders))
        taken = cycles * np.array(self.shares) + begun
        return np.concatenate([order.seen(int(number)) for order, number in zip(self.orders, taken, strict=True)])


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights → whole shares of a CYCLE, by largest remainders; none that is asked for gets nothing."""
    exact = np.array(weights) / sum(weights) * CYCLE
    shares = np.maximum(np.floor(exact).astype(int), 1)
    for which in np.argsort(shares - exact)[: CYCLE - shares.sum()]:
        shares[which] += 1
    while shares.sum() > CYCLE:  # many tiny weights were given one each
        shares[shares.argmax()] -= 1
    return tuple(shares.tolist())


@lru_cache(maxsize=4)
def turns_of(mixture: Mixture, cycle: int) -> tuple[np.ndarray, np.ndarray]:
    """For each position of a cycle, whose turn it is, and how many of that order's turns came before."""
    random = np.random.default_rng((mixture.seed, 7, cycle))
    turns = random.permutation(np.repeat(np.arange(len(mixture.shares)), mixture.shares))
    numbers = np.empty(CYCLE, dtype=np.int64)
    for which in range(len(mixture.shares)):
        mine = turns == which
        numbers[mine] = np.arange(mine.sum())
    return turns, numbers


@lru_cache(maxsize=16)
def permutation(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(shard, row) of every place in an epoch, as two arrays of 4 bytes a sample."""
    random = np.random.default_rng((order.seed, epoch))
    shuffled = random.permutation(len(order.rows))
    shards, rows = [], []
    for start in range(0, len(shuffled), order.group):
        members = shuffled[start : start + order.group]
        shard = np.concatenate([np.full(order.rows[i], i, dtype=np.int32) for i in members])
        row = np.concatenate([np.arange(order.rows[i], dtype=np.int32) for i in members])
        mixed = random.permutation(len(shard))
        shards.append(shard[mixed])
        rows.append(row[mixed])
    return np.concatenate(shards), np.concatenate(rows)
