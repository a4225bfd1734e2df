"""URL lists (Parquet, JSONL, CSV) → slices that each become one raw shard, and a slice's rows.

A list is gone through once to be cut, and each slice is entered where it begins: nobody holds a whole list.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow.parquet as pq
from pydantic import PositiveInt

from pipelines import storage
from pipelines.curation.sources import URL_COLUMNS, text_of
from pipelines.settings import OwlError, Settings

CAPTION_COLUMNS = ("caption", "TEXT", "text", "alt")


class Cutting(Settings):
    """How lists are read and cut."""

    url_column: str | None = None
    """The lists' column of URLs; None takes the first of url, URL and image_url."""
    caption_column: str | None = None
    """The lists' column of captions; None takes the first of caption, TEXT, text and alt."""
    samples_per_shard: PositiveInt = 10_000
    """URLs of a raw shard."""


@dataclass(frozen=True)
class Slice:
    """Some rows of a list that follow one another."""

    path: str
    first: int
    rows: int
    offset: int = 0
    """Where the first row begins, in bytes; nothing to Parquet."""


@dataclass
class Row:
    number: int
    url: str | None = None
    captions: list[str] = field(default_factory=list)
    problem: str | None = None
    """Why there is no URL."""


def cut(path: str, cutting: Cutting) -> list[Slice]:
    """A list's slices. Raises OwlError for a list that cannot be read, or has not the columns."""
    return read_with(path, lambda form: list(form.cut(path, cutting)))


def rows_of(part: Slice, cutting: Cutting) -> list[Row]:
    """A slice's rows, each with its URL and captions or what is wrong with it. Raises OwlError."""
    rows = read_with(part.path, lambda form: list(form.read(part, cutting)))
    if len(rows) != part.rows:
        raise OwlError(f"URL list {part.path} has changed: {len(rows)} rows from {part.first} on, not {part.rows}")
    return rows


def read_with(path: str, read: Callable[[Form], list]) -> list:
    form = next(form for ending, form in FORMS.items() if path.endswith(ending))
    try:
        return read(form)
    except OwlError:
        raise
    except Exception as error:  # readers raise a different class for each kind of damage
        raise OwlError(f"URL list {path} cannot be read: {error}") from None


def columns(path: str, names: Iterable[str], cutting: Cutting) -> tuple[str, str]:
    """The names of the columns of URLs and captions. Raises OwlError where one is missing."""
    names = list(names)
    found = []
    for setting, wanted, known in (
        ("url_column", cutting.url_column, URL_COLUMNS),
        ("caption_column", cutting.caption_column, CAPTION_COLUMNS),
    ):
        candidates = (wanted,) if wanted else known
        column = next((name for name in candidates if name in names), None)
        if column is None:
            raise OwlError(
                f"URL list {path} has no column {' or '.join(candidates)}; name one of its own with {setting}: "
                f"{', '.join(names)}"
            )
        found.append(column)
    return found[0], found[1]


def row_of(number: int, url: Any, caption: Any) -> Row:
    captions = [caption] if isinstance(caption, str) else caption if isinstance(caption, list) else []
    row = Row(number, None, [text_of(text) for text in captions if isinstance(text, str)])
    if isinstance(url, str) and url.strip():
        row.url = text_of(url.strip())
    else:
        row.problem = f"its URL is {url!r}"[:200]
    return row


# --- Parquet ---------------------------------------------------------------------------------------------------------


def cut_parquet(path: str, cutting: Cutting) -> Iterator[Slice]:
    with storage.open_read(path) as file:
        table = pq.ParquetFile(file)
        columns(path, table.schema_arrow.names, cutting)
        number, size = table.metadata.num_rows, cutting.samples_per_shard
    for first in range(0, number, size):
        yield Slice(path, first, min(size, number - first))


def read_parquet(part: Slice, cutting: Cutting) -> Iterator[Row]:
    """Opens only the row groups that the slice lies in."""
    with storage.open_read(part.path) as file:
        table = pq.ParquetFile(file)
        url, caption = columns(part.path, table.schema_arrow.names, cutting)
        sizes = [table.metadata.row_group(index).num_rows for index in range(table.num_row_groups)]
        begins = [0, *itertools.accumulate(sizes)]
        end = part.first + part.rows
        groups = [i for i, size in enumerate(sizes) if begins[i] < end and begins[i] + size > part.first]
        skipped = part.first - begins[groups[0]]
        batches = table.iter_batches(batch_size=1024, row_groups=groups, columns=[url, caption])
        values = (item for batch in batches for item in batch.to_pylist())
        for number, item in enumerate(itertools.islice(values, skipped, skipped + part.rows), part.first):
            yield row_of(number, item[url], item[caption])


# --- text ------------------------------------------------------------------------------------------------------------


def cut_text(records: Iterable[tuple[int, Any]], path: str, cutting: Cutting) -> Iterator[Slice]:
    """Slices of a file whose records come with their places."""
    size, number, offset = cutting.samples_per_shard, 0, 0
    for place, _ in records:
        if number and number % size == 0:
            yield Slice(path, number - size, size, offset)
        if number % size == 0:
            offset = place
        number += 1
    if number:
        first = (number - 1) // size * size
        yield Slice(path, first, number - first, offset)


def json_lines(file: IO[bytes], offset: int = 0) -> Iterator[tuple[int, bytes]]:
    file.seek(offset)
    for line in file:
        if line.strip():
            yield offset, line
        offset += len(line)


def cut_jsonl(path: str, cutting: Cutting) -> Iterator[Slice]:
    with storage.open_read(path) as file:
        for _, line in json_lines(file):
            with contextlib.suppress(ValueError):  # a line that is no object becomes a row that says so
                columns(path, fields_of(line), cutting)
                break
        yield from cut_text(json_lines(file), path, cutting)


def read_jsonl(part: Slice, cutting: Cutting) -> Iterator[Row]:
    urls = (cutting.url_column,) if cutting.url_column else URL_COLUMNS
    captions = (cutting.caption_column,) if cutting.caption_column else CAPTION_COLUMNS
    with storage.open_read(part.path) as file:
        lines = itertools.islice(json_lines(file, part.offset), part.rows)
        for number, (_, line) in enumerate(lines, part.first):
            try:
                fields = fields_of(line)
                url, caption = (next((fields[n] for n in names if n in fields), None) for names in (urls, captions))
                yield row_of(number, url, caption)
            except ValueError as error:
                yield Row(number, problem=str(error)[:200])


def fields_of(line: bytes) -> dict[str, Any]:
    """Raises ValueError where the line is no JSON object."""
    try:
        fields = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError("it is no JSON object")
    return fields


def csv_records(file: IO[bytes], offset: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Each record with the place of its first byte; a quoted one may span lines."""
    file.seek(offset)
    place = offset

    def lines() -> Iterator[str]:
        nonlocal place
        for line in file:
            text = line.decode("utf-8", "replace")
            text = text if place else text.removeprefix("\ufeff")
            place += len(line)
            yield text

    for values in csv.reader(lines()):
        if values:
            yield offset, values
        offset = place


def cut_csv(path: str, cutting: Cutting) -> Iterator[Slice]:
    with storage.open_read(path) as file:
        records = csv_records(file)
        _, names = next(records, (0, []))
        columns(path, names, cutting)
        yield from cut_text(records, path, cutting)


def read_csv(part: Slice, cutting: Cutting) -> Iterator[Row]:
    with storage.open_read(part.path) as file:
        _, names = next(csv_records(file))
        url, caption = (names.index(column) for column in columns(part.path, names, cutting))
        records = itertools.islice(csv_records(file, part.offset), part.rows)
        for number, (_, values) in enumerate(records, part.first):
            values += [""] * (len(names) - len(values))
            yield row_of(number, values[url], values[caption])


@dataclass(frozen=True)
class Form:
    cut: Callable[[str, Cutting], Iterator[Slice]]
    read: Callable[[Slice, Cutting], Iterator[Row]]


FORMS = {
    ".parquet": Form(cut_parquet, read_parquet),
    ".jsonl": Form(cut_jsonl, read_jsonl),
    ".csv": Form(cut_csv, read_csv),
}
