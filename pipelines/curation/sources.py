"""Raw shards → raw samples: WebDataset tars, Parquet, and folders of pictures with a JSONL.

A shard is read from front to back, once. A sample that cannot be read is yielded with its reason; only a file that
is no shard at all raises `UnreadableShard`.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow.parquet as pq
from braceexpand import braceexpand

from pipelines import storage
from pipelines.curation.tar import tar_members
from pipelines.records import from_llava, to_arrow_messages
from pipelines.settings import OwlError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
IMAGE_COLUMNS = ("image", "jpg", "image_bytes")
CAPTION_COLUMNS = ("caption", "captions", "text", "TEXT")
URL_COLUMNS = ("url", "URL", "image_url")


class UnreadableShard(OwlError):
    """A file that is no shard, or cannot be opened."""


@dataclass
class RawSample:
    """One sample as it was found. ``reason`` is set where it could not even be read whole."""

    key: str
    source: str
    images: list[bytes] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    messages: list[dict] | None = None
    url: str | None = None
    reason: str | None = None
    detail: str | None = None


def find_shards(patterns: list[str]) -> list[str]:
    """Raw shards that the patterns name (globs, {braces}, s3:// and other schemes, folders), sorted.

    Raises OwlError for a pattern that matches nothing.
    """
    return find_files(patterns, (".tar", ".parquet", ".jsonl"), "raw shard")


def find_files(patterns: list[str], endings: tuple[str, ...], what: str) -> list[str]:
    """Files with one of the ``endings``, sorted; a folder's are those of the first ending that is there."""
    *some, last = endings
    known = f"{', '.join(some)} {{}} {last}"
    found: list[str] = []
    for pattern in patterns:
        matched: list[str] = []
        for single in braceexpand(str(pattern)):
            try:
                matched += matching(single, endings)
            except (OSError, ValueError) as error:  # no right to look, no such bucket, no such scheme
                raise OwlError(f"{single} cannot be listed: {error}") from None
        if not matched:
            raise OwlError(f"no {what}s at {pattern!r}: no file there ends in {known.format('or')}")
        found += matched
    files = sorted({path.removeprefix("file://") for path in found})
    for path in files:
        if not path.endswith(endings):
            raise OwlError(f"{path} is no {what}: known are {known.format('and')}")
    return files


def matching(pattern: str, endings: tuple[str, ...]) -> list[str]:
    fs, plain = storage.filesystem(pattern)
    found: list[str] = fs.glob(plain)
    if fs.isdir(plain):
        found = next(filter(None, (fs.glob(f"{plain}/*{ending}") for ending in endings)), [])
    return [fs.unstrip_protocol(path) for path in found]


def read_shard(path: str) -> Iterator[RawSample]:
    """All samples of one raw shard, in order. Raises UnreadableShard."""
    readers = {".tar": read_tar, ".parquet": read_parquet, ".jsonl": read_jsonl}
    reader = readers[posixpath.splitext(path)[1]]
    try:
        yield from reader(path)
    except UnreadableShard:
        raise
    except Exception as error:  # readers raise a different class for each kind of damage
        raise UnreadableShard(f"raw shard {path} cannot be read: {error}") from None


def read_sample(path: str, source: str) -> RawSample:
    """One sample again, by its place: a tar is entered at the offset. Raises UnreadableShard where it is gone."""
    start = int(source.rpartition("@")[2])
    try:
        if path.endswith(".tar"):
            return next(read_tar(path, start))
        return next(sample for sample in read_shard(path) if sample.source == source)
    except (OSError, tarfile.TarError, StopIteration) as error:
        raise UnreadableShard(f"{source} is not in {path} any more: {error}") from None


def read_tar(path: str, start: int = 0) -> Iterator[RawSample]:
    """WebDataset: neighbouring members that share a name up to its first dot are one sample."""
    name, sample = storage.name_of(path), None
    with storage.open_read(path) as file:
        members = tar_members(file, start)
        while True:
            try:
                member = next(members, None)
            except tarfile.ReadError as error:
                if not error.args[1:]:
                    raise  # not one member was found: this is no tar
                offset, broken = error.args[1:]
                if sample is None or sample_key(broken) not in ("", sample.key):
                    if sample is not None:
                        yield sample
                    sample = RawSample(sample_key(broken), f"{name}@{offset}")
                sample.reason, sample.detail = "shard_truncated", str(error.args[0])
                break
            if member is None:
                break
            offset, member_name, data = member
            key = sample_key(member_name)
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = RawSample(key, f"{name}@{offset}")
            add_member(sample, posixpath.basename(member_name).partition(".")[2].lower(), data)
        if sample is not None:
            yield sample


def sample_key(member_name: str) -> str:
    folder, base = posixpath.split(member_name)
    return posixpath.join(folder, base.partition(".")[0])


def add_member(sample: RawSample, extension: str, data: bytes) -> None:
    kind = extension.rpartition(".")[2]
    if kind in IMAGE_EXTENSIONS:
        sample.images.append(data)
    elif kind == "txt":
        sample.captions.append(data.decode("utf-8", "replace"))
    elif kind == "json":
        try:
            add_fields(sample, json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            sample.reason, sample.detail = "json_malformed", f"{type(error).__name__}: {error}"


def add_fields(sample: RawSample, fields: dict) -> None:
    """Captions or a conversation from a sample's JSON; more captions than one replace the single one of its .txt."""
    sample.url = text_of(fields["url"]) if fields.get("url") else None
    if fields.get("messages"):
        sample.messages = to_arrow_messages(fields["messages"])
    elif fields.get("conversations"):
        sample.messages = to_arrow_messages(from_llava(fields["conversations"]))
    elif fields.get("captions"):
        sample.captions = [text_of(caption) for caption in fields["captions"]]
    elif fields.get("caption") is not None and not sample.captions:
        sample.captions = [text_of(fields["caption"])]


def text_of(value: object) -> str:
    """Text that can be written as UTF-8: JSON may hold halves of a letter."""
    return str(value).encode("utf-8", "replace").decode()


def read_parquet(path: str) -> Iterator[RawSample]:
    """Image bytes and captions in columns, as LAION and img2dataset write them."""
    name = storage.name_of(path)
    with storage.open_read(path) as file:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        image = next((column for column in IMAGE_COLUMNS if column in names), None)
        caption = next((column for column in CAPTION_COLUMNS if column in names), None)
        if image is None or caption is None:
            raise UnreadableShard(
                f"raw shard {path} has no column of picture bytes ({', '.join(IMAGE_COLUMNS)}) or no caption column "
                f"({', '.join(CAPTION_COLUMNS)}); it has {', '.join(names)}"
            )
        row = 0
        for batch in table.iter_batches(batch_size=256):
            for values in batch.to_pylist():
                picture, texts = values[image], values[caption]
                if isinstance(picture, dict):  # Hugging Face's Image feature: {"bytes": …, "path": …}
                    picture = picture.get("bytes")
                texts = [texts] if isinstance(texts, str) else texts or []
                key = str(values.get("key") or values.get("id") or f"{posixpath.splitext(name)[0]}-{row:08d}")
                url = next((text_of(values[column]) for column in URL_COLUMNS if values.get(column)), None)
                yield RawSample(key, f"{name}@{row}", [picture] if picture else [], texts, url=url)
                row += 1


def read_jsonl(path: str) -> Iterator[RawSample]:
    """One JSON object a line; "image" (or "images") are paths beside the file."""
    name, folder = storage.name_of(path), posixpath.dirname(path)
    offset = 0
    with storage.open_read(path) as file:
        for line in file:
            sample = RawSample(f"{posixpath.splitext(name)[0]}@{offset}", f"{name}@{offset}")
            offset += len(line)
            try:
                fields = json.loads(line)
                sample.key = str(fields.get("key") or fields.get("id") or sample.key)
                add_fields(sample, fields)
                paths = fields.get("images") or ([fields["image"]] if fields.get("image") else [])
                for relative in paths:
                    with storage.open_read(storage.join(folder, relative)) as picture:
                        sample.images.append(picture.read())
            except OSError:
                sample.reason, sample.detail = "image_missing", str(paths)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                sample.reason, sample.detail = "json_malformed", f"{type(error).__name__}: {error}"
            yield sample
