"""easy-VQA: drawn shapes, thirteen answers."""

import json
import tarfile

from pipelines import storage
from pipelines.evaluation.benchmarks.base import Benchmark, Question, ask, each, read_json
from pipelines.settings import OwlError

LAYOUT = "test/questions.json test/images/ (the repository's data folder), or test-*.tar with KEY.png and KEY.json"


def read(folder: str) -> list[Question]:
    if shards := [path for path in storage.listing(folder, ".tar") if storage.name_of(path).startswith("test")]:
        return [question for path in shards for question in read_shard(path)]
    rows = read_json(f"{folder}/test/questions.json")  # [question, answer, picture] each
    return [
        made(str(number), text, answer, f"{folder}/test/images/{picture}.png", str(picture))
        for number, (text, answer, picture) in enumerate(rows)
    ]


def read_shard(path: str) -> list[Question]:
    files: dict[str, dict[str, bytes]] = {}
    with storage.open_read(path) as file, tarfile.open(fileobj=file) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            files.setdefault(key, {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    questions = []
    for key, found in files.items():
        if not {"png", "json"} <= {*found}:
            raise OwlError(f"{path} holds no picture or no questions for {key}")
        asked = json.loads(found["json"])["qa"]
        questions += [made(f"{key}-{n}", qa["question"], qa["answer"], found["png"], key) for n, qa in enumerate(asked)]
    return questions


def made(id: str, text: str, answer: str, picture: str | bytes, unit: str) -> Question:
    kind = "yes_no" if answer in ("yes", "no") else "what"
    return Question(id, ask(text), [picture], {"question": text, "answer": answer}, kind, unit)


BENCHMARK = Benchmark(
    version="easy_vqa/1 exact match",
    about="9,673 questions on 1,000 drawings of one shape each; the answer is one word of thirteen.",
    source="https://github.com/vzhou842/easy-VQA",
    layout=LAYOUT,
    read=read,
    scores=each(lambda row: float(row["prediction"].strip().strip(".").lower() == row["answer"])),
)
