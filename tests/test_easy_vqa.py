"""easy-VQA's recipe, whole: a quarter of an hour."""

from __future__ import annotations

import pytest

from jobs.easy_vqa import baselines, caption_of, run
from jobs.recipes import load


def test_captions_tell_what_the_answers_tell():
    asked = [
        {"question": "what is the red shape?", "answer": "triangle"},
        {"question": "is there a red shape?", "answer": "yes"},
        {"question": "is there not a blue shape?", "answer": "yes"},
    ]
    assert caption_of(asked) == "red triangle"
    assert caption_of([{"question": "is no circle present?", "answer": "no"}]) == "circle"
    assert caption_of([{"question": "is there a teal shape?", "answer": "no"}]) == "shape"


@pytest.mark.slow
def test_a_small_owl_sees_more_than_the_questions_tell(cluster, shared, tmp_path, monkeypatch):
    monkeypatch.setenv("OWL_SHARED", str(shared.absolute()))
    source = str(shared.absolute() / "data/vqa/easy-vqa")
    known = baselines(source)
    assert known["question alone"] == pytest.approx(67.0, abs=0.1)
    assert known["always 'yes'"] == pytest.approx(37.3, abs=0.1)
    found = run(source, tmp_path, load("easy_vqa"))
    assert found["questions"] == 9673
    assert found["accuracy"]["low"] > 85
