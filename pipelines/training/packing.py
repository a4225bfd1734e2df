"""Several conversations in one row of a batch: which share a row, and which rank computes which rows.

The plan of a global batch follows from the lengths of its samples alone, so it is part of the order: every rank makes
the same one, and another number of ranks cuts the same rows anew.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

PICTURE = 256
"""What a picture's way through its encoder counts beside a token, when rows are shared out: its patches."""


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of samples by row, the longest first, each into the fullest row that still has room (best fit,
    decreasing). A sample longer than ``budget`` has a row for itself."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        found = bisect_left(room, (lengths[index], -1))
        left, row = room.pop(found) if found < len(room) else (budget, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(room, (left - lengths[index], row))
    return rows


def share_out(costs: Sequence[int], world: int) -> list[list[int]]:
    """Rows by rank, none with more than an even share, of costs as equal as the heaviest first makes them."""
    most = -(-len(costs) // world)
    ranks: list[list[int]] = [[] for _ in range(world)]
    sums = [0] * world
    for row in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(world) if len(ranks[r]) < most), key=lambda r: (sums[r], r))
        ranks[rank].append(row)
        sums[rank] += costs[row]
    return ranks


def plan(lengths: Sequence[int], pictures: Sequence[int], budget: int, world: int) -> list[list[list[int]]]:
    """Rank → rows → indices in the global batch."""
    rows = pack(lengths, budget)
    costs = [sum(lengths[i] + PICTURE * pictures[i] for i in row) for row in rows]
    return [[rows[row] for row in mine] for mine in share_out(costs, world)]
