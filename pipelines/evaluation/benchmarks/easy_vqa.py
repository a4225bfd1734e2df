"""easy-VQA: drawn shapes, thirteen answers."""

import json
import tarfile

from pipelines import storage
from pipelines.evaluation.benchmarks.base import Benchmark, Question, ask, each, read_json
from pipelines.settings import OwlError


def read(folder: str) -> list[Question]:
    return [
        made(f"{name}-{number}", qa["question"], qa["answer"], picture, name)
        for name, picture, asked in drawings(folder, "test")
        for number, qa in enumerate(asked)
    ]


def made(id: str, text: str, answer: str, picture: str | bytes, unit: str) -> Question:
    kind = "yes_no" if answer in ("yes", "no") else "what"
    return Question(id, ask(text), [picture], {"question": text, "answer": answer}, kind, unit)


def drawings(folder: str, split: str) -> list[tuple[str, str | bytes, list[dict]]]:
    """Each picture of a split ("train" or "test"): its name, its path or bytes, and its questions and answers."""
    if shards := [path for path in storage.listing(folder, ".tar") if storage.name_of(path).startswith(split)]:
        return [drawing for path in shards for drawing in read_shard(path)]
    asked: dict[str, list[dict]] = {}
    for text, answer, picture in read_json(f"{folder}/{split}/questions.json"):
        asked.setdefault(str(picture), []).append({"question": text, "answer": answer})
    return [(name, f"{folder}/{split}/images/{name}.png", qas) for name, qas in asked.items()]


def read_shard(path: str) -> list[tuple[str, str | bytes, list[dict]]]:
    files: dict[str, dict[str, bytes]] = {}
    with storage.open_read(path) as file, tarfile.open(fileobj=file) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            files.setdefault(key, {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    for key, found in files.items():
        if not {"png", "json"} <= {*found}:
            raise OwlError(f"{path} holds no picture or no questions for {key}")
    return [(key, found["png"], json.loads(found["json"])["qa"]) for key, found in sorted(files.items())]


BENCHMARK = Benchmark(
    version="easy_vqa/1 exact match",
    about="9,673 questions on 1,000 drawings of one shape each; the answer is one word of thirteen.",
    source="https://github.com/vzhou842/easy-VQA",
    layout="test/questions.json test/images/ (the repository's data folder), or test-*.tar with KEY.png and KEY.json",
    read=read,
    scores=each(lambda row: float(row["prediction"].strip().strip(".").lower() == row["answer"])),
)
