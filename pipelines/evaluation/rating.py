"""A web page, on this machine, where people grade answers of several systems A to D without knowing whose they are.

OwlEval's protocol (mPLUG-Owl, section 4.2). Every grade is a line of ratings.jsonl, written as it is given; of a
rater's grades of one answer the last counts. The table by ability and the raters' agreement come from those lines.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, HTMLResponse, Response
from pydantic import BaseModel, Field
from sklearn.metrics import cohen_kappa_score
from starlette.middleware.trustedhost import TrustedHostMiddleware

from pipelines import storage
from pipelines.evaluation.benchmarks.base import read_lines
from pipelines.evaluation.benchmarks.owleval import ABILITIES, GRADES, by_ability
from pipelines.evaluation.grading import fold_in, shares
from pipelines.evaluation.results import read_results
from pipelines.settings import OwlError

PAGE = Path(__file__).with_name("rating.html")


@dataclass(frozen=True)
class Study:
    """What is graded: questions, and each system's answers by question."""

    output: str
    questions: list[dict]
    answers: dict[str, dict[str, str]]

    def order(self, rater: str, question: str) -> list[str]:
        """Systems as this rater sees them at this question; another order each time, the same on every visit."""
        systems = sorted(name for name in self.answers if question in self.answers[name])
        random.Random(f"{rater} {question}").shuffle(systems)
        return systems


def study_of(output: str, others: Sequence[str]) -> Study:
    """An evaluation's answers and those of ``others``: evaluations of the same benchmark, or files of JSON lines with
    question_id, answer and model_id, as OwlEval's authors publish them. Raises OwlError where they answer no question
    that the first does."""
    if "://" in output:
        raise OwlError(f"grades are kept beside the answers, which must be in a folder of this machine, not {output}")
    results, rows = read_results(output)
    questions = [row for row in rows if row["condition"] == "picture"]
    own = Path(results["model"].rstrip("/")).name
    answers = {own: {row["id"]: row["answer"] for row in questions}}
    for other in others:
        name, theirs = answers_of(other)
        name = name if name not in answers else f"{name} ({other})"
        answers[name] = {id: text for id, text in theirs.items() if id in answers[own]}
        if not answers[name]:
            raise OwlError(f"{other} answers none of the questions of {output}")
    return Study(output, questions, answers)


def answers_of(path: str) -> tuple[str, dict[str, str]]:
    """A system's name, and its answers by question."""
    if not path.endswith(".jsonl"):
        results, rows = read_results(path)
        answers = {row["id"]: row["answer"] for row in rows if row["condition"] == "picture"}
        return Path(results["model"].rstrip("/")).name, answers
    lines = read_lines(path)
    try:
        return lines[0]["model_id"], {str(line["question_id"]): line["answer"] for line in lines}
    except (KeyError, IndexError):
        raise OwlError(f"{path} needs question_id, answer and model_id in every line") from None


class Grade(BaseModel):
    rater: str = Field(min_length=1, max_length=80)
    question: str
    place: int = Field(ge=0)
    """Which of the answers, as the rater sees them."""
    grade: Literal["A", "B", "C", "D"]


class Ratings:
    """The lines of ratings.jsonl."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        self.latest: dict[tuple[str, str, str], str] = {}
        """(rater, question, system) → grade"""
        for line in read_lines(str(path)) if path.exists() else []:
            self.latest[line["rater"], line["question"], line["system"]] = line["grade"]

    def add(self, rater: str, question: str, system: str, grade: str) -> None:
        line = {"time": time.time(), "rater": rater, "question": question, "system": system, "grade": grade}
        with self.lock, self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
            self.latest[rater, question, system] = grade

    def of(self, system: str) -> dict[str, dict[str, float]]:
        """Question → share of each grade among its raters."""
        given: dict[str, list[str]] = {}
        for (_, question, name), grade in self.latest.items():
            if name == system:
                given.setdefault(question, []).append(grade)
        return {question: shares(grades) for question, grades in given.items()}


def tables(study: Study, ratings: Ratings) -> dict[str, Any]:
    """Each system's counts of grades, all and by ability; and how far the raters agree."""
    systems = {}
    for name in study.answers:
        given = ratings.of(name)
        systems[name] = by_ability([{**seen(q), "grade": given[q["id"]]} for q in study.questions if q["id"] in given])
    return {"systems": systems, "agreement": agreement(ratings), "grades": dict(GRADES)}


def seen(question: dict) -> dict:
    """A question's abilities and turns; of other benchmarks than OwlEval it has none."""
    return {"abilities": question["facts"].get("abilities", []), "turns": question["facts"].get("turns", [])}


def agreement(ratings: Ratings) -> list[dict[str, Any]]:
    """Cohen's kappa of every two raters who graded the same answers, weighted by the square of the distance."""
    by_rater: dict[str, dict[tuple[str, str], str]] = {}
    for (rater, question, system), grade in ratings.latest.items():
        by_rater.setdefault(rater, {})[question, system] = grade
    found = []
    for one, two in combinations(sorted(by_rater), 2):
        both = sorted(by_rater[one].keys() & by_rater[two].keys())
        if len(both) < 2:
            continue
        a, b = ([by_rater[rater][key] for key in both] for rater in (one, two))
        same = len({*a, *b}) == 1  # all one grade: kappa is 0 / 0, and nobody disagreed
        kappa = 1.0 if same else float(cohen_kappa_score(a, b, labels=list(GRADES), weights="quadratic"))
        found.append({"raters": [one, two], "answers": len(both), "kappa": kappa})
    return found


def application(study: Study) -> FastAPI:
    """The page and its data. It answers to loopback names only, so that no other page can speak through a browser."""
    app = FastAPI(title="Owl: grade answers", docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    ratings = Ratings(Path(study.output) / "ratings.jsonl")
    questions = {question["id"]: question for question in study.questions}

    @app.get("/", response_class=HTMLResponse)
    def page() -> FileResponse:
        return FileResponse(PAGE, media_type="text/html")

    @app.get("/questions")
    def asked(rater: str) -> list[dict]:
        return [told(question, rater) for question in study.questions]

    def told(question: dict, rater: str) -> dict:
        order = study.order(rater, question["id"])
        return {
            "id": question["id"],
            "prompt": question["prompt"],
            "pictures": [f"pictures/{question['id']}/{number}" for number in range(len(question["pictures"]))],
            "abilities": [ABILITIES[letter] for letter in question["facts"].get("abilities", [])],
            "answers": [study.answers[name][question["id"]] for name in order],
            "grades": [ratings.latest.get((rater, question["id"], name)) for name in order],
        }

    @app.get("/pictures/{question}/{number}")
    def picture(question: str, number: int) -> Response:
        paths = questions[question]["pictures"] if question in questions else []
        if not 0 <= number < len(paths):
            raise HTTPException(404, "no such picture")
        return Response(storage.read_bytes(paths[number]), media_type="image/jpeg")

    @app.post("/grades", status_code=204)
    def grade(given: Grade) -> None:
        order = study.order(given.rater, given.question) if given.question in questions else []
        if given.place >= len(order):
            raise HTTPException(404, "no such answer")
        ratings.add(given.rater, given.question, order[given.place], given.grade)

    @app.get("/results")
    def results() -> dict:
        return tables(study, ratings)

    return app


def finish(study: Study) -> dict[str, Any]:
    """Writes ratings.json, the tables, and enters the grades into the evaluation's own results."""
    ratings = Ratings(Path(study.output) / "ratings.jsonl")
    found = tables(study, ratings)
    storage.write_json(f"{study.output}/ratings.json", found)
    own = next(iter(study.answers))
    raters = {rater for rater, _, _ in ratings.latest}
    if given := ratings.of(own):
        grades = {question: {"grade": share} for question, share in given.items()}
        fold_in(study.output, grades, f"{len(raters)} people")
    return found
