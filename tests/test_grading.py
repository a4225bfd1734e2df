"""Grades by a judge behind OpenAI's API, and by people in a real browser."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from official import WRITERS

from pipelines.evaluation.evaluate import Evaluation, evaluate
from pipelines.evaluation.grading import judge
from pipelines.evaluation.rating import Ratings, agreement, application, finish, study_of
from pipelines.serving.options import Serving
from pipelines.serving.serve import free_port, running
from pipelines.settings import OwlError


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """An application behind a real port of this machine."""
    port = free_port("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.05)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


def judging(reply, seen: list[dict]) -> FastAPI:
    """A judge that speaks OpenAI's API; ``reply`` makes its words of a request."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    def complete(request: dict) -> dict:
        seen.append(request)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply(request)}}
        return {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}

    return app


@pytest.fixture(scope="module")
def graded_by_nobody(cluster, model_folder, tmp_path_factory) -> Path:
    """OwlEval's layout answered by a model, and by two systems whose answers are published."""
    folder = tmp_path_factory.mktemp("owleval")
    WRITERS["owleval"](folder / "data")
    evaluate(model_folder, "owleval", f"{folder}/data", f"{folder}/out", Evaluation(max_new_tokens=4))
    for name in ("blip2", "mm-react"):
        rows = [{"question_id": n, "answer": f"{name} says {n}", "model_id": name, "image": "x"} for n in (1, 2, 3)]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture
def owleval(graded_by_nobody, tmp_path) -> Path:
    shutil.copytree(graded_by_nobody, tmp_path / "owleval")
    return tmp_path / "owleval"


def test_a_judge_grades_by_the_rubric_and_is_asked_once(cluster, model_folder, tmp_path):
    WRITERS["mm_vet"](tmp_path / "data")
    out, seen = f"{tmp_path}/out", []
    evaluate(model_folder, "mm_vet", f"{tmp_path}/data", out, Evaluation(max_new_tokens=4))
    with served(judging(lambda request: "0.4" if len(seen) == 1 else "no idea", seen)) as url:
        found = judge(out, f"{url}/v1", "judge")
        assert (found["graded"], found["unreadable"], len(seen)) == (1, 1, 2)
        assert found["metrics"]["mean"] == pytest.approx(40.0)
        assert found["headline"]["value"] == pytest.approx(40.0)
        assert found["graded_by"] == "judge by mm_vet/1, own wording and examples"
        judge(out, f"{url}/v1", "judge")
        assert len(seen) == 2
    grades = [json.loads(path.read_text()) for path in sorted((tmp_path / "out/grades").iterdir())]
    assert {grade["words"] for grade in grades} == {"0.4", "no idea"}
    for grade in grades:
        assert "What is x? | -1<AND>-5 |" in grade["prompt"]
        assert (grade["rubric"], grade["judge"]) == ("mm_vet/1, own wording and examples", "judge")
    scores = [row["score"] for row in pq.read_table(f"{out}/answers.parquet").to_pylist()]
    assert sorted(scores, key=str) == [0.4, None]


def test_a_judge_sees_the_picture_where_the_rubric_says_so(owleval):
    seen: list[dict] = []
    with served(judging(lambda request: "B", seen)) as url:
        found = judge(f"{owleval}/out", f"{url}/v1", "judge")
    assert found["metrics"]["A and B"] == 3
    assert found["metrics"]["abilities"]["Reasoning"]["B"] == 1
    assert all(part["content"][0]["type"] == "image_url" for part in (request["messages"][0] for request in seen))


@pytest.mark.slow
def test_our_own_server_can_be_the_judge(cluster, model_folder, owleval):
    """It knows no grades, being untrained: what it says is kept, and counted as unreadable."""
    with running(model_folder, Serving(port=0, cpus_per_replica=0.5, no_keys=True)) as address:
        found = judge(f"{owleval}/out", f"{address}/v1", "owl")
    assert found["graded"] + found["unreadable"] == 3


def test_a_judge_that_is_not_there_and_a_benchmark_without_a_rubric_are_named(owleval, cluster, model_folder, tmp_path):
    with pytest.raises(OwlError, match=r"the judge at http://127\.0\.0\.1:9/v1 does not answer"):
        judge(f"{owleval}/out", "http://127.0.0.1:9/v1", "judge")
    with pytest.raises(OwlError, match="no finished evaluation"):
        judge(str(tmp_path), "http://127.0.0.1:9/v1", "judge")


def test_people_grade_without_knowing_whose_answers_they_see(owleval):
    study = study_of(f"{owleval}/out", [f"{owleval}/blip2.jsonl", f"{owleval}/mm-react.jsonl"])
    client = TestClient(application(study), base_url="http://127.0.0.1")
    asked = client.get("/questions", params={"rater": "Ada"}).json()
    assert [question["id"] for question in asked] == ["1", "2", "3"]
    assert all(len(question["answers"]) == 3 for question in asked)
    told = json.dumps([{**question, "answers": []} for question in asked])
    assert not any(name in told for name in study.answers)
    orders = {tuple(study.order(rater, str(n))) for rater in ("Ada", "Bob", "Eve") for n in (1, 2, 3)}
    assert len(orders) > 1
    assert client.get(asked[0]["pictures"][0]).content == (owleval / "data/cases/1.jpg").read_bytes()
    given = {"rater": "Ada", "question": "1", "place": 0, "grade": "B"}
    assert client.post("/grades", json={**given, "grade": "A"}).status_code == 204
    assert client.post("/grades", json=given).status_code == 204  # thought again
    assert client.post("/grades", json={**given, "grade": "E"}).status_code == 422
    assert client.post("/grades", json={**given, "place": 9}).status_code == 404
    assert client.post("/grades", json={**given, "question": "99"}).status_code == 404
    assert client.get("/pictures/1/7").status_code == 404
    assert client.get("/", headers={"host": "elsewhere.example"}).status_code == 400
    first = study.order("Ada", "1")[0]
    assert client.get("/results").json()["systems"][first]["B"] == 1
    again = Ratings(owleval / "out/ratings.jsonl")  # as a new process would read it
    assert again.latest == {("Ada", "1", first): "B"}


def test_agreement_is_cohens_weighted_kappa(tmp_path):
    ratings = Ratings(tmp_path / "ratings.jsonl")
    for question, (one, two) in enumerate([("A", "A"), ("B", "C"), ("D", "D"), ("C", "C"), ("A", "B")]):
        ratings.add("Ada", str(question), "x", one)
        ratings.add("Bob", str(question), "x", two)
    # By hand (Cohen 1968): 1 - Σ (a - b)² observed / Σ (a - b)² expected by chance = 1 - 0.4 / 2.56
    assert agreement(ratings) == [{"raters": ["Ada", "Bob"], "answers": 5, "kappa": pytest.approx(1 - 0.4 / 2.56)}]


def test_shared_grades_enter_the_results(owleval):
    study = study_of(f"{owleval}/out", [])
    own = next(iter(study.answers))
    ratings = Ratings(owleval / "out/ratings.jsonl")
    for rater, grade in (("Ada", "A"), ("Bob", "C")):
        ratings.add(rater, "1", own, grade)
    finish(study)
    found = json.loads((owleval / "out/results.json").read_text())
    assert (found["graded"], found["graded_by"]) == (1, "2 people")
    assert found["metrics"]["A and B"] == 0.5
    report = (owleval / "out/report.html").read_text()
    assert "By ability" in report
    assert json.loads((owleval / "out/ratings.json").read_text())["systems"][own]["answers"] == 1


def test_others_must_answer_the_same_questions(owleval):
    (owleval / "other.jsonl").write_text(json.dumps({"question_id": 99, "answer": "x", "model_id": "x"}))
    with pytest.raises(OwlError, match="answers none of the questions"):
        study_of(f"{owleval}/out", [f"{owleval}/other.jsonl"])
    (owleval / "other.jsonl").write_text(json.dumps({"answer": "x"}))
    with pytest.raises(OwlError, match="needs question_id, answer and model_id"):
        study_of(f"{owleval}/out", [f"{owleval}/other.jsonl"])


def test_the_page_in_a_real_browser(chromium, owleval):
    study = study_of(f"{owleval}/out", [f"{owleval}/blip2.jsonl", f"{owleval}/mm-react.jsonl"])
    with served(application(study)) as url:
        page = chromium.new_page()
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.goto(url)
        page.fill("#rater", "Ada")
        page.get_by_text("Begin").click()
        page.wait_for_selector("fieldset")
        assert page.locator("fieldset").count() == 3
        assert page.locator("#pictures img").evaluate("image => image.complete && image.naturalWidth > 0")
        page.locator("fieldset").nth(0).get_by_text("right and satisfying").click()
        page.keyboard.press("ArrowDown")
        for key in ("b", "d"):
            page.keyboard.press(key)
        page.wait_for_function("document.getElementById('count').textContent === '3 of 9 answers'")
        page.keyboard.press("ArrowRight")
        assert page.locator("#place").inner_text() == "2 of 3"
        page.get_by_text("Tables").click()
        page.wait_for_selector("#results table")
        table = page.locator("#results").inner_text()
        assert all(name in table for name in study.answers)
        assert "Visual understanding" in table
        assert wrong == []
        page.close()
    order = study.order("Ada", "1")
    latest = Ratings(owleval / "out/ratings.jsonl").latest
    assert latest == {("Ada", "1", name): grade for name, grade in zip(order, "ABD", strict=True)}
