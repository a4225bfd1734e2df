"""Metrics, controls and resume of the evaluation."""

from __future__ import annotations

import os

import numpy as np
import pytest

from pipelines.evaluation.benchmarks import picture_world
from pipelines.evaluation.evaluate import Evaluation, evaluate, shown
from pipelines.evaluation.metrics import bootstrap_interval, exact_match, final_answer
from pipelines.settings import OwlError


@pytest.mark.parametrize(
    ("text", "final"),
    [("circle red", "circle red"), ("Circle green , so no .", "no"), ("a top , b left , so above", "above"), ("", "")],
)
def test_what_an_answer_comes_to(text, final):
    assert final_answer(text) == final


def test_exact_match():
    assert exact_match("circle red , so yes", "circle blue , so yes") == 1.0
    assert exact_match("circle red", "circle blue") == 0.0


def test_interval_covers_the_mean_and_widens_with_groups():
    values = np.repeat(np.random.default_rng(0).normal(1.0, 1.0, 40), 5)
    alone, grouped = bootstrap_interval(values), bootstrap_interval(values, np.repeat(np.arange(40), 5))
    assert alone[0] < values.mean() < alone[1]
    assert grouped[1] - grouped[0] > 1.5 * (alone[1] - alone[0])


def test_controls_show_another_picture_or_none(world):
    questions = picture_world.read(f"{world}/heldout")
    for question in questions:
        other, none = shown(question, "wrong picture", questions), shown(question, "no picture", questions)
        if not question.pictures:
            assert other is None
            assert none is None
            continue
        assert other["pictures"] != question.pictures
        assert len(other["pictures"]) == len(question.pictures)
        assert none["pictures"] == []
        assert not any(p["type"] == "image" for m in none["messages"] for p in m["content"] if isinstance(p, dict))


def test_a_lost_part_is_asked_again_and_nothing_else(cluster, world, model_folder, tmp_path):
    settings = Evaluation(part=16, batch_size=8, max_new_tokens=4)
    first = evaluate(model_folder, "picture_world", f"{world}/heldout", f"{tmp_path}/out", settings)
    answers = tmp_path / "out/answers"
    before = {path.name: path.stat().st_mtime_ns for path in answers.iterdir()}
    lost = sorted(before)[0]
    os.unlink(answers / lost)
    again = evaluate(model_folder, "picture_world", f"{world}/heldout", f"{tmp_path}/out", settings)
    assert again["scores"] == first["scores"]
    changed = [path.name for path in answers.iterdir() if before[path.name] != path.stat().st_mtime_ns]
    assert changed == [lost]
    assert (tmp_path / "out/report.html").read_text().count("<figure>") > 3


def test_unknown_benchmark_and_missing_files_are_named(model_folder, tmp_path):
    with pytest.raises(OwlError, match="unknown benchmark 'mmlu'"):
        evaluate(model_folder, "mmlu", "x", f"{tmp_path}/out", Evaluation())
    with pytest.raises(OwlError, match=r"no questions\.jsonl in"):
        evaluate(model_folder, "picture_world", str(tmp_path), f"{tmp_path}/out", Evaluation())
