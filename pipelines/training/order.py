"""Which sample comes when: a pure function of (seed, position), the same for any number of workers.

Positions number the samples of all epochs, 0, 1, 2, …; step k of global batch B takes positions kB … kB + B - 1, and
rank r of R takes every R-th of them. Shuffling is in two levels, so that reading stays near-sequential: the order of
shards, and a permutation within each group of neighbouring shards. The position of a run is one integer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Order:
    """``rows[i]`` is how many samples shard i holds; ``group`` how many shards are shuffled into each other."""

    rows: tuple[int, ...]
    seed: int
    group: int = 4

    def __len__(self) -> int:
        return sum(self.rows)

    def at(self, position: int) -> tuple[int, int]:
        """(shard, row) of a position. An epoch's permutation is computed once and kept."""
        epoch, place = divmod(position, len(self))
        shards, rows = permutation(self, epoch)
        return int(shards[place]), int(rows[place])

    def batch(self, step: int, size: int, rank: int = 0, world: int = 1) -> list[int]:
        """Positions of one rank's part of a global batch."""
        return list(range(step * size + rank, (step + 1) * size, world))


@lru_cache(maxsize=2)
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
