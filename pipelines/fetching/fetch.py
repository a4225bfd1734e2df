"""URL lists → raw shards, on Ray Data: a step of its own before curation.

A slice of a list becomes one WebDataset tar, and is the unit of work and of resume. A few processes, each with its
connections and what it knows of hosts, take slice after slice: they ask for all its URLs at once as far as manners
allow, put pictures aside in a temporary file as they come, and write them in the order of the list; then a row for
every URL, and a marker last.

NAME-00000.tar  fetched/NAME-00000.parquet  markers/NAME-00000.json
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import tarfile
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from pydantic import PositiveInt
from yarl import URL

from pipelines import storage
from pipelines.curation import ledger
from pipelines.curation.export import add_file, kind
from pipelines.curation.sources import find_files
from pipelines.fetching.download import Downloading, Visit, Web, begin_shard, open_web, picture
from pipelines.fetching.lists import FORMS, Cutting, Row, Slice, cut, rows_of
from pipelines.fetching.politeness import Unfetched
from pipelines.progress import progress
from pipelines.records import FETCHED
from pipelines.settings import OwlError, refuse_other_settings


class Fetching(Downloading, Cutting):
    """How the pictures of URL lists are fetched."""

    processes: PositiveInt = 4
    """Most processes that fetch at once; never more than there are CPUs."""


def fetch(lists: list[str], output: str, settings: Fetching) -> dict[str, Any]:
    """Fetches what the URL lists name into raw shards in the folder ``output``; returns {"in", "kept", "dropped",
    "shards"} with counts by reason.

    Shards finished by an earlier run are not touched again. Raises OwlError where a list cannot be read, where the
    folder was made with other settings or other lists, and, after finishing all others, where a shard could not be
    made.
    """
    slices = plan(find_files(lists, tuple(FORMS), "URL list"), settings)
    refuse_other_settings(output, settings)
    done = ledger.finished(output) & slices.keys()
    for shard in sorted(done):
        refuse_other_slice(f"{output}/markers/{shard}.json", slices[shard])
    todo = {shard: part for shard, part in slices.items() if shard not in done}
    if problems := fetch_and_write(todo, len(slices), output, settings) if todo else []:
        raise OwlError(f"{len(problems)} of {len(slices)} shards could not be fetched: {problems[0]}")
    entries = [storage.read_json(f"{output}/markers/{shard}.json") for shard in slices]
    ledger.check_books(entries)
    return {**ledger.total(entries), "shards": len(entries)}


# --- what is to do ---------------------------------------------------------------------------------------------------


def plan(paths: list[str], settings: Fetching) -> dict[str, Slice]:
    """Shard names and the slices they are made of, in order. Raises OwlError."""
    names: dict[str, str] = {}
    for path in paths:
        if other := names.get(name_of(path)):
            raise OwlError(f"{other} and {path} would give shards of one name; fetch them into different folders")
        names[name_of(path)] = path
    cuts = ray.get([cut_list.remote(path, settings.model_dump()) for path in paths])
    for _, problem in cuts:
        if problem:
            raise OwlError(problem)
    return {
        f"{name_of(path)}-{number:05d}": part
        for path, (parts, _) in zip(paths, cuts, strict=True)
        for number, part in enumerate(parts)
    }


@ray.remote(num_cpus=0.5)
def cut_list(path: str, settings: dict) -> tuple[list[Slice], str | None]:
    """The list's slices, or what is wrong with it: Ray would wrap an error in a traceback."""
    try:
        return cut(path, Fetching(**settings)), None
    except OwlError as error:
        return [], str(error)


def name_of(path: str) -> str:
    """A list's name in shards and keys: no dots, since WebDataset cuts names at the first."""
    return PurePosixPath(path).stem.replace(".", "_")


def refuse_other_slice(marker: str, part: Slice) -> None:
    before = storage.read_json(marker)
    if (before["list"], before["first"], before["in"]) != (part.path, part.first, part.rows):
        raise OwlError(
            f"{marker} is of rows {before['first']} to {before['first'] + before['in']} of {before['list']}, which "
            f"now would be {part.first} to {part.first + part.rows} of {part.path}; choose another folder"
        )


# --- the job ---------------------------------------------------------------------------------------------------------


def fetch_and_write(todo: dict[str, Slice], total: int, output: str, settings: Fetching) -> list[str]:
    """Runs the Ray Data job over the shards in ``todo``; returns what is wrong with those that could not be made."""
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts shards and pictures
    work = [{"shard": shard, **asdict(part)} for shard, part in todo.items()]
    processes = min(settings.processes, len(work), max(1, int(ray.cluster_resources().get("CPU", 1))))
    blocks = min(len(work), BLOCKS_PER_PROCESS * processes)
    with progress("fetch", total, "shards", done=total - len(todo)) as counter:
        given = {"output": output, "settings": settings.model_dump(), "processes": processes, "counter": counter}
        fetched = ray.data.from_items(work, override_num_blocks=blocks).map_batches(
            Fetcher,
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=processes, max_tasks_in_flight_per_actor=1),
            fn_constructor_kwargs=given,
        )
        return [row["problem"] for row in fetched.iter_rows() if row["problem"] is not None]


BLOCKS_PER_PROCESS = 1000
"""Slices are handed out singly, or some at a time where there are more than so many."""
NAME_SERVER_THREADS = 64
"""Look-ups of names at once in one process; one of a dead name takes seconds."""


class Fetcher:
    """One process: its connections and its memory of hosts outlast a shard."""

    def __init__(self, output: str, settings: dict, processes: int, counter: ray.actor.ActorHandle):
        self.output, self.settings, self.counter = output, Fetching(**settings), counter
        self.runner = asyncio.Runner()
        self.runner.get_loop().set_default_executor(ThreadPoolExecutor(NAME_SERVER_THREADS))
        self.web = self.runner.run(open_web(self.settings, processes))

    def __call__(self, work: pa.Table) -> pa.Table:
        """Fetches some slices; those with a marker were done by an earlier try of this task."""
        problems: list[str] = []
        for item in work.to_pylist():
            shard = item.pop("shard")
            if storage.exists(f"{self.output}/markers/{shard}.json"):
                continue
            try:
                marker = self.fetch_slice(shard, Slice(**item))
            except OwlError as error:
                problems.append(str(error))
                continue
            self.counter.advance.remote(1, f"{marker['kept']} of {marker['in']} fetched in {shard}")
        return pa.table({"problem": pa.array(problems, pa.string())})

    def fetch_slice(self, shard: str, part: Slice) -> dict[str, Any]:
        rows = rows_of(part, self.settings)
        with tempfile.TemporaryFile() as aside:
            answers = self.runner.run(answers_to(rows, self.web, name_of(part.path), aside))
            return write_shard(self.output, shard, part, answers, aside)


# --- a slice ---------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What became of one row; the picture lies aside."""

    key: str
    row: Row
    visit: Visit
    reason: str | None = None
    detail: str | None = None
    offset: int = 0
    bytes: int | None = None
    fetched: str = ""
    """When, in UTC."""


async def answers_to(rows: list[Row], web: Web, name: str, aside: IO[bytes]) -> list[Answer]:
    """What became of each row, in order. Pictures are put into ``aside`` in the order in which they came."""
    begin_shard(web)
    return await asyncio.gather(*(answer_to(row, web, f"{name}-{row.number:09d}", aside) for row in rows))


async def answer_to(row: Row, web: Web, key: str, aside: IO[bytes]) -> Answer:
    answer = Answer(key, row, Visit(URL()))
    try:
        answer.visit.url = parsed(row)
        data = await picture(web, answer.visit)
        answer.offset, answer.bytes = aside.tell(), aside.write(data)
        answer.fetched = datetime.now(UTC).isoformat(timespec="seconds")
    except Unfetched as why:
        answer.reason, answer.detail = why.reason, why.detail
    except Exception as error:  # whatever a server can provoke ends in a row
        answer.reason, answer.detail = "failed", f"{type(error).__name__}: {error}"[:300]
    return answer


def parsed(row: Row) -> URL:
    if row.url is None:
        raise Unfetched("row_malformed", row.problem)
    try:
        return URL(row.url)
    except ValueError as error:
        raise Unfetched("url_malformed", str(error)[:200]) from None


def write_shard(output: str, shard: str, part: Slice, answers: list[Answer], aside: IO[bytes]) -> dict[str, Any]:
    """Writes the tar, if it has a picture, then a row for every URL, then the marker, which is returned. Raises
    OwlError instead of writing a marker where it seems that this machine has no network."""
    path = f"{output}/{shard}.tar"
    storage.remove(path)  # of a run that was killed before the marker
    kept = write_tar(path, answers, aside) if any(answer.reason is None for answer in answers) else 0
    with storage.open_write(f"{output}/fetched/{shard}.parquet") as file:
        pq.write_table(pa.Table.from_pylist([as_row(answer) for answer in answers], FETCHED), file, compression="zstd")
    refuse_outage(shard, answers)
    dropped = Counter(answer.reason for answer in answers if answer.reason is not None)
    marker = {
        "shard": shard,
        "list": part.path,
        "first": part.first,
        "in": part.rows,
        "kept": kept,
        "dropped": dict(sorted(dropped.items())),
    }
    ledger.check_books([marker])
    storage.write_json(f"{output}/markers/{shard}.json", marker)
    return marker


def write_tar(path: str, answers: list[Answer], aside: IO[bytes]) -> int:
    """KEY.jpg (or .png …) as it came, KEY.txt and KEY.json for each picture; returns how many."""
    kept = 0
    with storage.open_write(path) as file, tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for answer in answers:
            if answer.reason is None:
                aside.seek(answer.offset)
                data = aside.read(answer.bytes or 0)
                facts = {"sha256": hashlib.sha256(data).hexdigest(), **facts_of(answer)}
                add_file(tar, f"{answer.key}.{kind(data)}", data)
                add_file(tar, f"{answer.key}.txt", facts["caption"].encode())
                add_file(tar, f"{answer.key}.json", json.dumps(facts, ensure_ascii=False).encode())
                kept += 1
    return kept


def facts_of(answer: Answer) -> dict[str, Any]:
    captions = answer.row.captions
    return {
        "url": answer.row.url,
        "caption": captions[0] if captions else "",
        **({"captions": captions} if len(captions) > 1 else {}),
        "status": answer.visit.status,
        "final_url": str(answer.visit.url),
        "fetched": answer.fetched,
    }


def as_row(answer: Answer) -> dict[str, Any]:
    return {
        "key": answer.key,
        "url": answer.row.url,
        "final_url": str(answer.visit.url) or None,
        "status": answer.visit.status,
        "reason": answer.reason,
        "detail": answer.detail,
        "bytes": answer.bytes,
        "seconds": answer.visit.seconds,
    }


NOT_ASKED = (
    "row_malformed",
    "url_malformed",
    "scheme_refused",
    "credentials_refused",
    "port_refused",
    "address_refused",
)
NOT_REACHED = ("connection_failed", "host_unknown", "host_unreachable", "timeout", "robots_unavailable")
HOSTS_OF_AN_OUTAGE = 10
"""Where so many hosts were tried and not one could be reached, the fault is here."""


def refuse_outage(shard: str, answers: list[Answer]) -> None:
    """Raises OwlError where not one of many hosts could be reached: a marker would make that final."""
    asked = [answer for answer in answers if answer.reason not in NOT_ASKED]
    hosts = {answer.visit.url.raw_host for answer in asked}
    none_reached = all(answer.reason in NOT_REACHED and answer.visit.status is None for answer in asked)
    if none_reached and len(hosts) >= HOSTS_OF_AN_OUTAGE:
        raise OwlError(
            f"not one of the {len(hosts)} hosts of {shard} could be reached, so it seems that there is no network; "
            f"the same command tries again"
        )
