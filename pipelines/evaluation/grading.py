"""Grades of open answers, from a language model or from people, go into an evaluation's results."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import mimetypes
from collections.abc import Iterable
from typing import Any

from openai import AsyncOpenAI, OpenAIError

from pipelines import storage
from pipelines.evaluation.benchmarks import named
from pipelines.evaluation.benchmarks.base import Benchmark, Rubric
from pipelines.evaluation.evaluate import conclude
from pipelines.evaluation.results import facts_of, read_results
from pipelines.settings import OwlError

AT_ONCE = 8
TRACED = ("benchmark", "model", "model_sha256", "split_sha256", "decoding")


def benchmark_of(results: dict) -> Benchmark:
    return named(results["benchmark"].split("/")[0])


def fold_in(output: str, grades: dict[str, dict], by: str) -> dict:
    """Enters grades, what they add to each question's facts, and computes the results anew."""
    before, rows = read_results(output)
    graded = [{**row, "facts": {**row["facts"], **grades.get(row["id"], {})}} for row in rows]
    traced = {name: before[name] for name in TRACED} | {"graded_by": by}
    return conclude(benchmark_of(before), graded, traced, output)


def judge(output: str, url: str, model: str, key: str = "none") -> dict[str, Any]:
    """Has a language model behind an OpenAI-compatible endpoint grade the answers of a finished evaluation.

    Each grade is a file in ``output``/grades with the rubric, the whole prompt and the judge's words, written as soon
    as it is there; a rerun asks only for those that are missing. Returns the results, with "unreadable": how many of
    the judge's answers held no grade.

    Raises OwlError where the benchmark has no rubric or the endpoint does not answer.
    """
    results, rows = read_results(output)
    rubric = benchmark_of(results).rubric
    if rubric is None:
        raise OwlError(f"{results['benchmark']} is scored by a rule and needs no judge")
    asked = [row for row in rows if row["condition"] == "picture" and row["error"] is None]
    try:
        given = asyncio.run(ask_all(output, asked, rubric, url, model, key))
    except OpenAIError as error:
        raise OwlError(f"the judge at {url} does not answer: {error}") from None
    read = {id: rubric.read(words) for id, words in given.items()}
    grades = {id: facts for id, facts in read.items() if facts is not None}
    found = fold_in(output, grades, f"{model} by {rubric.version}")
    return {**found, "unreadable": len(read) - len(grades)}


async def ask_all(output: str, rows: list[dict], rubric: Rubric, url: str, model: str, key: str) -> dict[str, str]:
    """The judge's words about each answer, by question."""
    places = asyncio.Semaphore(AT_ONCE)
    async with AsyncOpenAI(base_url=url, api_key=key, max_retries=5) as client:
        given = await asyncio.gather(*(ask(output, row, rubric, client, model, places) for row in rows))
    return dict(given)


async def ask(
    output: str, row: dict, rubric: Rubric, client: AsyncOpenAI, model: str, places: asyncio.Semaphore
) -> tuple[str, str]:
    prompt = rubric.prompt.format(**facts_of(row))
    name = hashlib.sha256(f"{rubric.version}\n{model}\n{client.base_url}\n{prompt}".encode()).hexdigest()[:24]
    path = f"{output}/grades/{row['id'].replace('/', '_')}-{name}.json"
    if storage.exists(path):
        return row["id"], storage.read_json(path)["words"]
    content: list[dict] = [{"type": "text", "text": prompt}]
    if rubric.shows_pictures:
        content = [{"type": "image_url", "image_url": {"url": uri(picture)}} for picture in row["pictures"]] + content
    async with places:
        reply = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": content if rubric.shows_pictures else prompt}],  # type: ignore[typeddict-item]
            temperature=0,
            max_tokens=512,
        )
    words = reply.choices[0].message.content or ""
    grade = {"id": row["id"], "rubric": rubric.version, "judge": model, "url": str(client.base_url)}
    storage.write_json(path, {**grade, "prompt": prompt, "answer": row["answer"], "words": words})
    return row["id"], words


def uri(path: str) -> str:
    kind = mimetypes.guess_type(path)[0] or "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(storage.read_bytes(path)).decode()}"


def shares(grades: Iterable[str]) -> dict[str, float]:
    """Of several raters' grades of one answer, the share of each."""
    given = list(grades)
    return {grade: given.count(grade) / len(given) for grade in sorted({*given})}
