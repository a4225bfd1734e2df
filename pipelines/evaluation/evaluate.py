"""A model folder answers a benchmark's questions, on Ray Data: with their pictures, and under two controls.

Controls: the same questions with another question's pictures, and without pictures. A model that sees falls to
chance under both. Questions go out in parts of about one length; a part's answers are one Arrow file, and a rerun asks
only the parts that are missing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import Datasink

from pipelines import storage
from pipelines.evaluation.benchmarks import BENCHMARKS
from pipelines.evaluation.metrics import Question, bootstrap_interval
from pipelines.evaluation.report import write_report
from pipelines.progress import progress
from pipelines.records import ANSWERS
from pipelines.settings import OwlError, Settings, differences

log = logging.getLogger(__name__)

CONDITIONS = ("picture", "wrong picture", "no picture")


class Evaluation(Settings):
    """How a benchmark is run."""

    max_new_tokens: int = 32
    """Longest answer."""
    part: int = 256
    """Questions in a part, the unit of work and of resume."""
    batch_size: int = 64
    """Questions that are decoded together."""
    actors: int = 1
    """Model replicas."""
    cpus_per_actor: float = 1
    """CPUs of a replica."""
    gpus_per_actor: float = 0
    """GPUs of a replica."""
    controls: bool = True
    """Whether the two controls are run too."""


def evaluate(model: str, benchmark: str, data: str, output: str, settings: Evaluation) -> dict:
    """Returns the results: accuracy by question type and condition. Answers and report.html are in ``output``."""
    if benchmark not in BENCHMARKS:
        raise OwlError(f"unknown benchmark {benchmark!r}; known: {', '.join(BENCHMARKS)}")
    if not storage.exists(f"{model}/config.json"):
        raise OwlError(f"no model folder at {model!r}: it has no config.json")
    refuse_other_run(output, {"model": model, "benchmark": benchmark, "data": data, **settings.model_dump()})
    questions = BENCHMARKS[benchmark].read(data)
    parts = plan(questions, settings)
    todo = [part for part in parts if not storage.exists(f"{output}/answers/{part['name']}.arrow")]
    began = time.monotonic()
    if todo:
        asked = sum(len(part["items"]) for part in todo)
        total = sum(len(part["items"]) for part in parts)
        with progress("evaluate", total, "answers", done=total - asked) as counter:
            ask(model, benchmark, todo, output, settings, counter)
    answers = [row for part in parts for row in read_answers(output, part["name"])]
    results = {
        "benchmark": BENCHMARKS[benchmark].VERSION,
        "model": model,
        "seconds": round(time.monotonic() - began, 1),
        "scores": summarize(answers),
    }
    storage.write_json(f"{output}/results.json", results)
    write_report(f"{output}/report.html", results, questions, answers)
    return results


def plan(questions: list[Question], settings: Evaluation) -> list[dict]:
    """Parts of questions: [{"name", "condition", "items": [{id, type, messages, pictures, expected}]}]."""
    conditions = CONDITIONS if settings.controls else CONDITIONS[:1]
    parts = []
    for condition in conditions:
        asked = (shown(question, condition, questions) for question in questions)
        items = [item for item in asked if item is not None]
        items.sort(key=lambda item: (len(item["pictures"]), len(item["messages"]), item["id"]))
        for start in range(0, len(items), settings.part):
            name = f"{condition.replace(' ', '-')}-{start // settings.part:05d}"
            parts.append({"name": name, "condition": condition, "items": items[start : start + settings.part]})
    return parts


def shown(question: Question, condition: str, questions: list[Question]) -> dict | None:
    """A question as it is asked under a condition; None where it needs no picture and the condition is a control."""
    pictures, messages = question.pictures, question.messages
    if condition != "picture" and not pictures:
        return None
    if condition == "wrong picture":
        others = [q for q in questions if len(q.pictures) == len(pictures) and q.pictures != pictures]
        place = next(index for index, q in enumerate(questions) if q is question)
        pictures = others[(place * 7919) % len(others)].pictures
    elif condition == "no picture":
        pictures = []
        messages = [
            {**m, "content": [part for part in m["content"] if part["type"] == "text"]}
            if isinstance(m["content"], list)
            else m
            for m in messages
        ]
    fields = {"id": question.id, "type": question.type, "expected": question.expected}
    return {**fields, "messages": messages, "pictures": pictures}


def ask(model: str, benchmark: str, parts: list[dict], output: str, settings: Evaluation, counter) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = None
    resources = {"num_gpus": settings.gpus_per_actor} if settings.gpus_per_actor else {}
    (
        ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
        .map_batches(
            Answerer,
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=min(settings.actors, len(parts))),
            num_cpus=settings.cpus_per_actor,
            fn_constructor_args=(model, benchmark, settings.model_dump()),
            **resources,
        )
        .write_datasink(AnswerSink(output, counter))
    )


class Answerer:
    """Holds the model in an actor and answers parts."""

    def __init__(self, model: str, benchmark: str, settings: dict):
        import torch  # only actors need it and the model; the driver would wait seconds for them

        from owl_model.answering import answer, load

        self.settings = Evaluation.model_validate(settings)
        self.score = BENCHMARKS[benchmark].score
        self.reply = answer
        torch.set_num_threads(max(1, int(self.settings.cpus_per_actor)))
        self.owl, self.processor = load(model)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        rows: list[dict[str, Any]] = []
        for part in batch["part"]:
            items = list(part["items"])
            for start in range(0, len(items), self.settings.batch_size):
                rows += self.answer(items[start : start + self.settings.batch_size], part["condition"])
            for row in rows:
                row["part"] = part["name"]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def answer(self, items: list[dict], condition: str) -> list[dict]:
        messages = [plain(item["messages"]) for item in items]
        pictures = [[read(path) for path in item["pictures"]] for item in items]
        options = {"max_new_tokens": self.settings.max_new_tokens}
        texts = self.reply(self.owl, self.processor, messages, pictures, **options)
        return [
            {
                "id": item["id"],
                "type": item["type"],
                "condition": condition,
                "prompt": last_words(spoken),
                "answer": text,
                "expected": item["expected"],
                "score": self.score(text, item["expected"]),
            }
            for item, spoken, text in zip(items, messages, texts, strict=True)
        ]


def plain(messages: Iterable[dict]) -> list[dict]:
    """Messages as they come back from Arrow: null fields taken out."""
    return [
        {
            "role": m["role"],
            "content": m["content"]
            if isinstance(m["content"], str)
            else [{k: v for k, v in part.items() if v is not None} for part in m["content"]],
        }
        for m in messages
    ]


def read(path: str) -> bytes:
    with storage.open_read(path) as file:
        return file.read()


def last_words(messages: list[dict]) -> str:
    content = messages[-1]["content"]
    return content if isinstance(content, str) else " ".join(p["text"] for p in content if p["type"] == "text")


class AnswerSink(Datasink):
    """One Arrow file a part."""

    def __init__(self, output: str, counter):
        self.output, self.counter = output, counter

    def write(self, blocks: Iterable[pa.Table], ctx) -> None:
        for block in blocks:
            if not len(block):
                continue
            name = block["part"][0].as_py()
            table = block.select(ANSWERS.names).cast(ANSWERS)
            storage.write_arrow(f"{self.output}/answers/{name}.arrow", table)
            self.counter.advance.remote(len(table), name)


def read_answers(output: str, name: str) -> list[dict]:
    return storage.open_arrow(f"{output}/answers/{name}.arrow").read_all().to_pylist()


def summarize(answers: list[dict]) -> dict[str, dict]:
    """condition → type → {n, accuracy, low, high}; "all" is every question, "all with pictures" those that have
    some, which is what the controls compare with."""
    out: dict[str, dict] = {}
    for condition in CONDITIONS:
        rows = [row for row in answers if row["condition"] == condition]
        groups = {"all": rows, "all with pictures": [row for row in rows if row["type"] != "text_only"]}
        for kind in sorted({row["type"] for row in rows}):
            groups[kind] = [row for row in rows if row["type"] == kind]
        for kind, members in groups.items():
            if members and not (kind == "all" and condition != "picture"):
                scores = np.array([row["score"] for row in members])
                low, high = bootstrap_interval(scores)
                entry = {"n": len(members), "accuracy": float(scores.mean()), "low": low, "high": high}
                out.setdefault(condition, {})[kind] = entry
    return out


def refuse_other_run(output: str, now: dict) -> None:
    path = f"{output}/settings.json"
    if storage.exists(path) and (changed := differences(storage.read_json(path), now)):
        raise OwlError(f"{output} holds another evaluation ({changed}); choose another folder")
    storage.write_json(path, now)
