"""Duplicates, found by moving keys and never pictures; `likeness.py` says what counts as alike.

ledgers → marks ──spread by key──▶ meet ──by the better one's shard──▶ merge → show ──by the other's shard──▶ enter

Of two samples alike, the one that `Deduplication.keep` prefers stays, and the other is dropped, whether or not the one
that stays is itself dropped in favour of a third. So a verdict depends on pairs alone, and not on how the work was
spread. Samples of `earlier` and `apart_from` are always preferred.

Memory: each of up to PARTS tasks holds a PARTS-th of the marks (32 bytes a picture) of one round, in four copies at
worst. The driver holds references, PARTS² at most, and of one round the pairs: results below 100 KB stay with whoever
asked for them. Rounds follow one another, and each leaves its pairs in files: references would have the driver keep all
that it takes to compute them again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipelines import storage
from pipelines.curation import ledger
from pipelines.curation.likeness import (
    MATTERS,
    REASONS,
    Columns,
    Deduplication,
    alike_pictures,
    asked_for,
    centres,
    jaccard,
    nearest_centres,
    plain,
    preferences,
)
from pipelines.records import THUMBNAIL, THUMBNAILS

PARTS = 256
ROWS_A_PART = 1_000_000
PLACE_BITS = 32
PLACE = 2**PLACE_BITS - 1
ALWAYS_KEPT = 2**62
CENTRE_ROWS = 5000
SAMPLED = 20_000


class Book(NamedTuple):
    """One shard's ledger. A sample's order is its book's rank and its place there."""

    folder: str
    shard: str


def remove_duplicates(
    output: str, shards: list[str], kept: int, settings: Deduplication, settled: Mapping[str, int] | None = None
) -> list[dict]:
    """Enters which of the ``kept`` rows of some ``shards`` of ``output`` are duplicates; returns each one's entry of
    the books. The samples that its ``settled`` shards keep, so many each, stay, as those of earlier datasets do."""
    others = [
        (Book(ledger.folder_and_version(folder)[0], entry["shard"]), entry["kept"])
        for folder in [*settings.apart_from, *settings.earlier]
        for entry in ledger.manifest_of(folder)["shards"]
    ]
    others += [(Book(output, shard), rows) for shard, rows in (settled or {}).items()]
    plan = Plan(
        [book for book, _ in others] + [Book(output, shard) for shard in shards],
        parts=min(PARTS, -(-(kept + sum(rows for _, rows in others)) // ROWS_A_PART) or 1),
        apart=sum(len(ledger.manifest_of(folder)["shards"]) for folder in settings.apart_from),
        own=len(others),
        settings=settings,
    )
    given, pairs = ray.put(plan), f"{output}/pairs"
    found = []
    for matter in asked_for(settings):
        known = [look.remote(given, matter, group) for group in range(len(plan.groups))]
        if matter == "meaning":
            known = about_centres(known, plan)
        for number in range(MATTERS[matter].rounds(settings)):
            found.append(find_pairs(plan, given, matter, number, known, pairs))
    by_groups = list(zip(*found, strict=True))
    shown = [scatter(show, len(plan.groups), given, group, paths) for group, paths in enumerate(by_groups)]
    columns = list(zip(*shown, strict=True))
    entered = [enter.remote(given, group, *columns[group]) for group in plan.own_groups()]
    entries = [entry for some in ray.get(entered) for entry in some]
    storage.remove(pairs)
    return entries


def find_pairs(
    plan: Plan, given: ray.ObjectRef, matter: str, number: int, known: list[ray.ObjectRef], folder: str
) -> list[str]:
    """One round; a file of pairs a group."""
    spreads = [scatter(spread, plan.parts, given, matter, number, marks) for marks in known]
    met = [scatter(meet, len(plan.groups), given, matter, number, *part) for part in zip(*spreads, strict=True)]
    paths = [f"{folder}/{matter}-{number:02d}-{group:03d}.arrow" for group in range(len(plan.groups))]
    ray.get([merge.remote(path, *some) for path, *some in zip(paths, *met, strict=True)])
    return paths


class Plan:
    """Which shards there are, and how the work is cut."""

    def __init__(self, books: list[Book], parts: int, apart: int, own: int, settings: Deduplication):
        self.books, self.parts, self.apart, self.own, self.settings = books, parts, apart, own, settings
        self.groups = [*cut(0, own, parts), *cut(own, len(books), parts)]
        """Ranges of ranks. None holds both other datasets' books and this one's."""

    def own_groups(self) -> list[int]:
        return [group for group, (first, _) in enumerate(self.groups) if first >= self.own]

    def group_of(self, orders: np.ndarray) -> np.ndarray:
        return np.searchsorted([end for _, end in self.groups], orders >> PLACE_BITS, side="right")


def cut(first: int, end: int, parts: int) -> list[tuple[int, int]]:
    edges = np.linspace(first, end, min(parts, end - first) + 1).astype(int).tolist()
    return list(pairwise(edges))


def scatter(task, count: int, *arguments) -> list[ray.ObjectRef]:
    """References to the ``count`` results of a task."""
    results = task.options(num_returns=count).remote(*arguments)
    return results if count > 1 else [results]


def results_of(tables: Sequence) -> Sequence:
    """What a task of as many results returns."""
    return tuple(tables) if len(tables) > 1 else tables[0]


def joined(parts: Sequence[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def taken(columns: Columns, rows: np.ndarray) -> Columns:
    return {name: values[rows] for name, values in columns.items()}


@ray.remote(num_cpus=1, max_retries=-1)
def look(plan: Plan, matter: str, group: int) -> Columns:
    """The marks of a group's samples that are still in question, with their order and preference."""
    columns, marks_of = MATTERS[matter].columns, MATTERS[matter].marks
    found = []
    first, end = plan.groups[group]
    for rank in range(first, end):
        table = candidates(plan.books[rank], columns, plan.settings.keep, own=rank >= plan.own)
        rows, marks = marks_of(table)
        order = (rank << PLACE_BITS) + table["place"].to_numpy()
        wish = preferences(table, plan.settings.keep) if rank >= plan.own else np.full(len(table), ALWAYS_KEPT)
        found.append({"order": order[rows], "preference": wish[rows], **marks})
    return joined(found)


def candidates(book: Book, columns: tuple[str, ...], keep: str, own: bool) -> pa.Table:
    """A ledger's rows that no other reason has dropped; of another dataset's, those that were kept."""
    wanted = {"row", "reason", *columns} | {"largest": {"width", "height"}, "score": {"image_text"}}.get(keep, set())
    table = ledger.read_ledger(book.folder, book.shard, sorted(wanted - {"embedding"}))
    if "embedding" in wanted:
        table = table.append_column("embedding", ledger.embeddings(book.folder, book.shard, table["row"]))
    table = table.append_column("place", pa.array(np.arange(len(table))))
    still = pc.is_in(table["reason"], value_set=pa.array([None, *(REASONS if own else ())], pa.string()))
    return table.filter(pc.and_(table["row"].is_valid(), still))


def about_centres(known: list[ray.ObjectRef], plan: Plan) -> list[ray.ObjectRef]:
    """Marks with the nearest of some centres, which are found in a sample of the embeddings."""
    few = [sample.remote(marks, -(-SAMPLED // len(known))) for marks in known]
    some = np.concatenate([vectors for vectors in ray.get(few) if len(vectors)] or [np.zeros((1, 1), np.float32)])
    count = max(1, min(len(some) // 8, plan.parts * ROWS_A_PART // CENTRE_ROWS))
    found = ray.put(centres(some, count))
    return [with_nearest.remote(marks, found) for marks in known]


@ray.remote(num_cpus=1, max_retries=-1)
def sample(marks: Columns, count: int) -> np.ndarray:
    vectors = marks["vector"]
    return vectors[np.linspace(0, len(vectors) - 1, min(count, len(vectors))).astype(int)]


@ray.remote(num_cpus=1, max_retries=-1)
def with_nearest(marks: Columns, found: np.ndarray) -> Columns:
    empty = np.zeros((0, 2), dtype=np.int64)
    return {**marks, "nearest": nearest_centres(marks["vector"], found) if len(marks["vector"]) else empty}


@ray.remote(num_cpus=1, max_retries=-1)
def spread(plan: Plan, matter: str, number: int, marks: Columns):
    """A group's marks, cut by the key of one round."""
    part = MATTERS[matter].key(marks, plan.settings, number) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
    part = (part % np.uint64(plan.parts)).astype(np.int64)
    return results_of([taken(marks, np.flatnonzero(part == each)) for each in range(plan.parts)])


@ray.remote(num_cpus=1, max_retries=-1)
def meet(plan: Plan, matter: str, number: int, *parts: Columns):
    """Pairs of samples alike, or perhaps so, among those that share a key; cut by the better one's group."""
    kind = MATTERS[matter]
    marks = joined(parts)
    rank = np.lexsort((marks["order"], -marks["preference"]))  # the better one comes first
    marks = taken(marks, rank)
    found = []
    if "same" in marks:
        _, firsts, which = np.unique(marks["same"], return_index=True, return_inverse=True)
        others = np.flatnonzero(firsts[which] != np.arange(len(which)))
        if number == 0:
            found.append(pairs_of(marks, firsts[which[others]], others, REASONS.index(kind.same)))
        marks = taken(marks, np.sort(firsts))
    key = kind.key(marks, plan.settings, number)
    for one, two in kind.pairs(marks, key, plan.settings):
        found.append(pairs_of(marks, np.minimum(one, two), np.maximum(one, two), REASONS.index(kind.like)))
    pairs = joined(found or [pairs_of(marks, np.zeros(0, int), np.zeros(0, int), 0)])
    pairs = taken(pairs, np.flatnonzero(pairs["worse"] >> PLACE_BITS >= plan.own))
    return by_group(plan, pairs, "better")


def pairs_of(marks: Columns, better: np.ndarray, worse: np.ndarray, kind: int) -> Columns:
    return {
        "better": marks["order"][better],
        "worse": marks["order"][worse],
        "preference": marks["preference"][better],
        "kind": np.full(len(better), kind, dtype=np.int8),
    }


def by_group(plan: Plan, pairs: Columns, side: str):
    group = plan.group_of(pairs[side])
    return results_of([taken(pairs, np.flatnonzero(group == each)) for each in range(len(plan.groups))])


@ray.remote(num_cpus=1, max_retries=-1)
def merge(path: str, *parts: Columns) -> None:
    """Writes one round's pairs of a group."""
    storage.write_arrow(path, pa.table(once(joined(parts))))


class Seen(NamedTuple):
    """One thing of some samples: ``orders``, sorted, and a value for each."""

    orders: np.ndarray
    values: pa.Array

    def of(self, orders: np.ndarray) -> pa.Array:
        return self.values.take(pa.array(np.searchsorted(self.orders, orders)))

    def only(self, orders: np.ndarray) -> Seen:
        orders = np.unique(orders)
        return Seen(orders, self.of(orders))


class Shown(NamedTuple):
    """Pairs, and what their better ones look like: a key, and thumbnail or words where these must decide."""

    pairs: Columns
    keys: Seen
    thumbnails: Seen
    words: Seen


@ray.remote(num_cpus=1, max_retries=-1)
def show(plan: Plan, group: int, paths: Sequence[str]) -> Iterator[Shown]:
    """Pairs whose better ones stand in this group, with what the others need to know of them; cut by their groups."""
    tables = [storage.read_arrow(path) for path in paths]
    pairs = once({name: pa.concat_tables(tables)[name].to_numpy() for name in PAIR})
    keys = read(plan, pairs["better"], "key")
    thumbnails = read(plan, of_kind(pairs, "duplicate_near")["better"], "thumbnail")
    words = read(plan, of_kind(pairs, "duplicate_caption_near")["better"], "words")
    targets = plan.group_of(pairs["worse"])
    for target in range(len(plan.groups)):
        mine = taken(pairs, np.flatnonzero(targets == target))
        yield Shown(
            mine,
            keys.only(mine["better"]),
            thumbnails.only(of_kind(mine, "duplicate_near")["better"]),
            words.only(of_kind(mine, "duplicate_caption_near")["better"]),
        )


def once(pairs: Columns) -> Columns:
    """Pairs that met in several rounds, once."""
    order = np.lexsort((pairs["better"], pairs["worse"], pairs["kind"]))
    pairs = taken(pairs, order)
    new = np.ones(len(order), dtype=bool)
    new[1:] = np.any([np.diff(pairs[name]) != 0 for name in ("kind", "worse", "better")], axis=0)
    return taken(pairs, np.flatnonzero(new))


def of_kind(pairs: Columns, reason: str) -> Columns:
    return taken(pairs, np.flatnonzero(pairs["kind"] == REASONS.index(reason)))


def read(plan: Plan, orders: np.ndarray, what: str) -> Seen:
    """Keys, thumbnails or words of samples. One ledger is held at a time."""
    orders = np.unique(orders)
    ranks = orders >> PLACE_BITS
    kind, at = READERS[what]
    found = [at(plan.books[rank], orders[ranks == rank] & PLACE) for rank in np.unique(ranks)]
    return Seen(orders, pa.concat_arrays([values.cast(kind) for values in found] or [pa.array([], kind)]))


def column_at(book: Book, places: np.ndarray, name: str) -> pa.Array:
    return ledger.read_ledger(book.folder, book.shard, [name])[name].take(places).combine_chunks()


def thumbnails_at(book: Book, places: np.ndarray) -> pa.Array:
    column = storage.read_arrow(f"{book.folder}/thumbnails/{book.shard}.arrow")["thumbnail"]
    return column.take(column_at(book, places, "row")).combine_chunks()


def words_at(book: Book, places: np.ndarray) -> pa.Array:
    return pa.array([plain(captions) for captions in column_at(book, places, "captions").to_pylist()], pa.string())


READERS: dict[str, tuple[pa.DataType, Callable[[Book, np.ndarray], pa.Array]]] = {
    "key": (pa.large_string(), lambda book, places: column_at(book, places, "key")),
    "thumbnail": (THUMBNAILS.field("thumbnail").type, thumbnails_at),
    "words": (pa.large_string(), words_at),
}


@ray.remote(num_cpus=1, max_retries=-1)
def enter(plan: Plan, group: int, *parts: Shown) -> list[dict]:
    """Decides on the pairs whose worse ones stand in this group, and enters it; one entry of the books a shard."""
    best: dict[int, tuple[int, int, int, str]] = {}
    for part, alike in zip(parts, decide(plan, parts), strict=True):
        pairs = taken(part.pairs, np.flatnonzero(alike))
        keys = part.keys.of(pairs["better"]).to_pylist()
        for better, worse, preference, kind, key in zip(*(pairs[name].tolist() for name in PAIR), keys, strict=True):
            found = (kind, -preference, better, key)
            best[worse] = min(best.get(worse, found), found)
    decided: dict[int, list[dict]] = defaultdict(list)
    for order, (kind, _, better, key) in best.items():
        rank = better >> PLACE_BITS
        where = f" in {plan.books[rank].folder}" if plan.books[rank].folder != plan.books[plan.own].folder else ""
        reason = "contaminated" if rank < plan.apart else REASONS[kind]
        item = {"place": order & PLACE, "reason": reason, "detail": f"kept instead: {key}{where}"}
        decided[order >> PLACE_BITS].append(item)
    first, end = plan.groups[group]
    return [
        ledger.decide(plan.books[rank].folder, plan.books[rank].shard, decided[rank], instead_of=LATER)
        for rank in range(first, end)
    ]


PAIR = ("better", "worse", "preference", "kind")
LATER = (*REASONS, "contaminated")


def decide(plan: Plan, parts: Sequence[Shown]) -> Iterator[np.ndarray]:
    """For each part [N] whether its pairs are alike, where more than their meeting must decide."""
    thumbnails, words = (
        read(plan, np.concatenate([of_kind(part.pairs, reason)["worse"] for part in parts]), what)
        for reason, what in (("duplicate_near", "thumbnail"), ("duplicate_caption_near", "words"))
    )
    for part in parts:
        kinds, better, worse = (part.pairs[name] for name in ("kind", "better", "worse"))
        alike = np.ones(len(kinds), dtype=bool)
        near = np.flatnonzero(kinds == REASONS.index("duplicate_near"))
        for start in range(0, len(near), AT_ONCE):
            some = near[start : start + AT_ONCE]
            one, two = pixels_of(part.thumbnails, better[some]), pixels_of(thumbnails, worse[some])
            alike[some] = alike_pictures(one, two, plan.settings)
        near = np.flatnonzero(kinds == REASONS.index("duplicate_caption_near"))
        pairs = zip(part.words.of(better[near]).to_pylist(), words.of(worse[near]).to_pylist(), strict=True)
        likeness = [jaccard(*pair) for pair in pairs]
        alike[near] = np.array(likeness) >= plan.settings.caption_likeness
        yield alike


def pixels_of(seen: Seen, orders: np.ndarray) -> np.ndarray:
    """[N, 3·16·16] of samples' thumbnails."""
    values = b"".join(seen.of(orders).to_pylist())
    return np.frombuffer(values, np.uint8).reshape(-1, 3 * THUMBNAIL**2)


AT_ONCE = 20_000
"""Pairs whose thumbnails are compared at once: 30 MB, and twice 60 as numbers."""
