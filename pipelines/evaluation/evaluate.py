"""A model folder answers a benchmark's questions, on Ray Data: with their pictures and, if asked, under two controls.

Controls: the same questions with another question's pictures, and without pictures. A model that sees falls to
chance under both. Questions go out in batches of about one length; a batch's answers are one file, written as soon as
they are there, so that a rerun asks only what was never answered. Scores are computed at the end from all answers, and
each answer's row says what they can be traced to.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any, Literal

import ray.data

from pipelines import storage
from pipelines.evaluation import results
from pipelines.evaluation.asking import Answerer
from pipelines.evaluation.benchmarks import BENCHMARKS, named
from pipelines.evaluation.benchmarks.base import Benchmark, Question
from pipelines.evaluation.captioning import with_clip_scores
from pipelines.evaluation.plan import CONDITIONS, plan, refuse_without_choices, sample
from pipelines.evaluation.report import table_of, write_report, write_table
from pipelines.progress import progress
from pipelines.settings import OwlError, Settings, differences


class Evaluation(Settings):
    """How a benchmark is run."""

    max_new_tokens: int = 0
    """Longest answer; 0 for the benchmark's own."""
    answers: Literal["generate", "likelihood"] = "generate"
    """Whether the model writes answers, or the likeliest of a question's choices is taken."""
    batch_size: int = 64
    """Questions that are answered together, the unit of resume."""
    actors: int = 1
    """Model replicas."""
    cpus_per_actor: float = 1
    """CPUs of a replica."""
    gpus_per_actor: float = 0
    """GPUs of a replica."""
    controls: bool = False
    """Whether the two controls are run too."""
    clip: str = ""
    """Folder of a CLIP, by which captions also get a CLIPScore."""
    limit: int = 0
    """Questions that are asked, spread over all; 0 asks all. A part's figures compare with nobody's."""


PLACEMENT = ("actors", "cpus_per_actor", "gpus_per_actor")
"""Settings that change no answer."""


def evaluate(model: str, benchmark: str, data: str, output: str, settings: Evaluation) -> dict:
    """Returns the results; answers.parquet, results.json and report.html are in ``output``.

    Raises OwlError for a folder that is no model, a benchmark's missing file (with the place where its owners publish
    it), or an ``output`` that holds another evaluation.
    """
    chosen = named(benchmark)
    if not storage.exists(f"{model}/config.json"):
        raise OwlError(f"no model folder at {model!r}: it has no config.json")
    questions = kept(sample(read_questions(chosen, data), settings.limit), output)
    traced = {
        "benchmark": chosen.version,
        "model": model,
        "model_sha256": fingerprint(model),
        "split_sha256": split_hash(questions),
        "decoding": json.dumps(decoding(chosen, settings)),
    }
    refuse_other_run(output, {**traced, **settings.model_dump(exclude={*PLACEMENT})})
    if settings.answers == "likelihood":
        refuse_without_choices(questions)
    batches = plan(questions, settings.batch_size, settings.controls)
    todo = [batch for batch in batches if not storage.exists(answered(output, batch["name"]))]
    if todo:
        ask(model, todo, output, settings, traced, sum(len(batch["items"]) for batch in batches))
    rows = read_answers(output, batches, questions)
    if settings.clip:
        rows = with_clip_scores(rows, settings.clip)
    return conclude(chosen, rows, traced, output)


def evaluate_several(model: str, names: str, data: str, output: str, settings: Evaluation) -> dict[str, Any]:
    """Benchmarks one after another, by name with commas between, or "all" whose files are below ``data``, each in a
    folder of its name. Returns the table as papers show it, {"head", "rows"}: systems down, benchmarks across.

    Raises OwlError for a name that is none, or where there is nothing to ask.
    """
    there = [storage.name_of(path) for path in storage.folders(data)]
    wanted = [name for name in BENCHMARKS if name in there] if names == "all" else names.split(",")
    if not wanted:
        raise OwlError(f"no folder in {data} has a benchmark's name; `owl eval benchmarks` lists them")
    for name in wanted:
        read_questions(named(name), f"{data}/{name}")  # what is missing is told before anything is asked
    found = {name: evaluate(model, name, f"{data}/{name}", f"{output}/{name}", settings) for name in wanted}
    table = table_of(found, storage.name_of(model))
    storage.write_json(f"{output}/table.json", table)
    write_table(f"{output}/table.html", model, table)
    return table


def conclude(benchmark: Benchmark, rows: list[dict], traced: dict, output: str) -> dict:
    """Scores answers, and writes them down with the results and the report."""
    rows = results.scored(benchmark, rows)
    found = {**traced, **results.summarize(benchmark, rows)}
    storage.write_parquet(f"{output}/answers.parquet", results.to_table(rows))
    storage.write_json(f"{output}/results.json", found)
    write_report(f"{output}/report.html", benchmark, found, rows)
    return found


def read_questions(benchmark: Benchmark, data: str) -> list[Question]:
    if benchmark.read is None:
        raise OwlError(f"{benchmark.version}: nothing to ask a model; `owl eval score` scores predictions")
    try:
        questions = benchmark.read(data)
        for question in (questions[0], questions[-1]):
            for path in question.pictures:
                if isinstance(path, str) and not storage.exists(path):
                    raise FileNotFoundError(path)
        return questions
    except FileNotFoundError as error:
        missing = error.filename or error.args[0]
        raise OwlError(
            f"no {missing}: {benchmark.version.split('/')[0]} reads {benchmark.layout}, published at {benchmark.source}"
        ) from None


def kept(questions: list[Question], output: str) -> list[Question]:
    """Pictures that stand in the official file are kept as files of their own, for whoever looks at answers later."""
    there = {storage.name_of(path) for path in storage.listing(f"{output}/pictures", "")}

    def as_path(picture: str | bytes) -> str:
        if isinstance(picture, str):
            return picture
        name = hashlib.sha256(picture).hexdigest()[:24]
        if name not in there:
            there.add(name)
            with storage.open_write(f"{output}/pictures/{name}") as file:
                file.write(picture)
        return f"{output}/pictures/{name}"

    return [
        Question(**{**vars(question), "pictures": [as_path(picture) for picture in question.pictures]})
        for question in questions
    ]


def fingerprint(model: str) -> str:
    """Of the files that decide what a model folder answers."""
    names = [path for ending in (".json", ".safetensors", ".bin", ".model") for path in storage.listing(model, ending)]
    digests = [f"{storage.name_of(path)} {storage.sha256(path)}" for path in sorted(names)]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def split_hash(questions: Sequence[Question]) -> str:
    digest = hashlib.sha256()
    for q in questions:
        row = [q.id, q.messages, [storage.name_of(str(path)) for path in q.pictures], q.facts, q.follows]
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def decoding(benchmark: Benchmark, settings: Evaluation) -> dict[str, Any]:
    if settings.answers == "likelihood":
        return {"answers": "likelihood"}
    longest = settings.max_new_tokens or benchmark.max_new_tokens
    return {"max_new_tokens": longest, "min_new_tokens": min(benchmark.min_new_tokens, longest), "do_sample": False}


def answered(output: str, name: str) -> str:
    return f"{output}/answers/{name}.parquet"


def ask(model: str, batches: list[dict], output: str, settings: Evaluation, traced: dict, total: int) -> None:
    """Answers batches in an actor pool; each actor loads the model once. run.json tells how fast it went."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = None
    resources = {"num_gpus": settings.gpus_per_actor} if settings.gpus_per_actor else {}
    asked = sum(len(batch["items"]) for batch in batches)
    began, tokens = time.monotonic(), 0
    with progress("evaluate", total, "answers", done=total - asked) as counter:
        done = ray.data.from_items(
            [{"batch": json.dumps(batch)} for batch in batches], override_num_blocks=len(batches)
        ).map_batches(
            Answerer,
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=min(settings.actors, len(batches))),
            num_cpus=settings.cpus_per_actor,
            fn_constructor_args=(model, output, settings.model_dump(), traced, counter),
            **resources,
        )
        for row in done.iter_rows():
            tokens += int(row["tokens"])
    seconds = time.monotonic() - began
    speed = {"answers": asked, "seconds": seconds, "answers_per_second": asked / seconds}
    storage.write_json(
        f"{output}/run.json", {**speed, "tokens_per_second": tokens / seconds, "actors": settings.actors}
    )


def read_answers(output: str, batches: list[dict], questions: list[Question]) -> list[dict]:
    """All answers, in the order of conditions and questions."""
    place = {question.id: number for number, question in enumerate(questions)}
    rows = [row for batch in batches for row in storage.read_parquet(answered(output, batch["name"])).to_pylist()]
    rows.sort(key=lambda row: (CONDITIONS.index(row["condition"]), place[row["id"]]))
    return [{**row, "facts": json.loads(row["facts"])} for row in rows]


def refuse_other_run(output: str, now: dict) -> None:
    path = f"{output}/settings.json"
    if storage.exists(path) and (changed := differences(storage.read_json(path), now)):
        raise OwlError(f"{output} holds another evaluation ({changed}); choose another folder")
    storage.write_json(path, now)
