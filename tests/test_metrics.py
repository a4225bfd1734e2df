"""Metrics against predictions of published models whose scores are known, and by hand where there are none."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext

import numpy as np
import pytest

from pipelines.evaluation import captioning
from pipelines.evaluation.metrics import (
    anls,
    bootstrap_interval,
    chosen,
    exact_match,
    final_answer,
    mathvista_value,
    mme_word,
    open_match,
    pope_yes,
    relaxed_match,
    resamples,
    scienceqa_letter,
    textvqa_accuracy,
    vqa_accuracy,
)
from pipelines.evaluation.results import score_predictions

FILES = {
    "textvqa_val_llava15_13b_a": "textvqa",
    "pope_coco_random_llava15_13b": "pope",
    "mme_lavin": "mme",
    "scienceqa_test_llava15_13b": "scienceqa",
    "mathvista_testmini_mplugowl": "mathvista",
    "mmvet_llava15_7b_gpt4_grades": "mm_vet",
    "llavabench_wild_llava15_7b_reviews": "llava_bench",
    "coco_caption_fakecap126": "coco_caption",
    "coco_caption_mplug_owl_instr1": "coco_caption",
    "clipscore_readme_example": "coco_caption",
    "flickr8k_expert": "flickr8k_expert",
}
LEFT_OUT = ("SPICE", "CLIPScore", "RefCLIPScore")
"""SPICE's jars are not on PyPI, and the pictures are not there."""
PUBLISHED = {
    "scienceqa_test_llava15_13b": lambda scores: {"image_subset": scores["image_subset"]},
    "mathvista_testmini_mplugowl": lambda scores: scores["accuracy"],
    "mmvet_llava15_7b_gpt4_grades": lambda scores: scores["mean"],
    "llavabench_wild_llava15_7b_reviews": lambda scores: int(10 * scores["mean"]) / 10,  # theirs is cut, not rounded
    "clipscore_readme_example": lambda scores: {
        name: {metric: value for metric, value in scores[name].items() if metric not in (*LEFT_OUT, "tokenizer")}
        for name in ("good", "bad")
    },
}
"""What of our metrics a repository of the authors' reports; what is only recalled from papers is not held to."""
SLOW = tuple(name for name, benchmark in FILES.items() if benchmark in ("coco_caption", "flickr8k_expert"))
"""Java is started four times for each set, and reads 17,000 captions in the last."""


def digits(value: float) -> int:
    text = f"{value:.10f}".rstrip("0") if "e" in repr(value) else repr(value)
    return len(text.partition(".")[2])


def same(ours, printed) -> None:
    """Equal to the digits that were printed."""
    if isinstance(printed, dict):
        for name, value in printed.items():
            same(ours[name], value)
    elif isinstance(printed, list):
        for one, value in zip(ours, printed, strict=True):
            same(one, value)
    else:
        assert round(ours, digits(float(printed))) == pytest.approx(printed, abs=1e-9)


@pytest.mark.parametrize("file", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FILES])
def test_published_predictions_score_what_was_published(shared, file):
    expected = {row["file"]: row for row in json.loads((shared / "data/evals/expected.json").read_text())}
    row = expected[f"{file}.jsonl"]
    lines = [json.loads(line) for line in (shared / f"data/evals/{file}.jsonl").read_text().splitlines()]
    found = score_predictions(FILES[file], lines)
    single = {"textvqa": "accuracy", "mathvista": "accuracy"}.get(FILES[file])
    same(found[single] if single else found, row["computed"])
    if published := PUBLISHED.get(file):
        same(published(found), published(row["published"]) if isinstance(row["published"], dict) else row["published"])


@pytest.mark.parametrize(
    ("text", "final"),
    [("circle red", "circle red"), ("Circle green , so no .", "no"), ("a top , b left , so above", "above"), ("", "")],
)
def test_what_an_answer_comes_to(text, final):
    assert final_answer(text) == final


def test_exact_match():
    assert exact_match("circle red , so yes", "circle blue , so yes") == 1.0
    assert exact_match("circle red", "circle blue") == 0.0


@pytest.mark.parametrize(
    ("answer", "people", "score"),
    [
        ("two", ["2"] * 10, 1.0),
        ("the cat", ["cat"] * 2 + ["dog"] * 8, 0.6),  # 8 people leave 2 who agree, 2 leave 1
        ("dont", ["don't", "don't", "don't", "don't"] + ["no"] * 6, 1.0),
        ("x, y", ["x y"] * 9 + ["z"], 1.0),
        ("", ["x"] * 10, 0.0),
    ],
)
def test_vqa_accuracy(answer, people, score):
    assert vqa_accuracy(answer, people) == pytest.approx(score, abs=0.01)


def test_textvqa_sets_a_possessive_apart():
    assert textvqa_accuracy("Nokia's", ["nokia 's"] * 10) == 1.0
    assert vqa_accuracy("Nokia's", ["nokia 's"] * 10) == 0.0


def test_likeness_of_spellings():
    assert anls("9 May", ["9 may", "may 9"]) == 1.0
    assert anls("9 Mai", ["9 may"]) == pytest.approx(0.8)
    assert anls("yesterday", ["9 may"]) == 0.0
    assert relaxed_match("104", "100") == 1.0
    assert relaxed_match("106", "100") == 0.0
    assert relaxed_match("5%", "0.05") == 1.0
    assert relaxed_match("Red.", "red") == 1.0


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(b)", ""),
        ("B. oak", "B"),
        ("(C) left", "C"),
        ("The answer is (A).", "A"),
        ("Answer: C", "C"),
        ("I think B is right", ""),
        ("It shows an oak tree", "B"),
        ("A dog runs", ""),
        ("an owl and an oak", ""),
        ("E", ""),
        ("nowhere", ""),
    ],
)
def test_which_choice_an_answer_means(answer, letter):
    assert chosen(answer, ["owl", "oak", "now"]) == letter


def test_quirks_of_official_readers():
    assert scienceqa_letter("B") == scienceqa_letter("B. because") == scienceqa_letter("The answer is B.") == "B"
    assert scienceqa_letter("it is B") == "FAILED"
    assert [mme_word(text) for text in ("Yes, it is", "no", "The yes", "maybe")] == ["yes", "no", "other", "other"]
    assert [pope_yes(text) for text in ("No", "Yes", "There is not one. Yes", "A dog. No", "nothing")] == [
        False,
        True,
        False,
        True,
        True,
    ]
    free = {"choices": None, "question_type": "free_form", "answer_type": "integer", "precision": None}
    assert mathvista_value("12", free) == "12"
    assert mathvista_value("12.4", free) is None
    assert mathvista_value("1.26", {**free, "answer_type": "float", "precision": 1.0}) == "1.3"
    several = {**free, "question_type": "multi_choice", "choices": ["north", "south"]}
    assert mathvista_value("(B) x", several) == mathvista_value("soth", several) == "south"
    assert open_match("about 1,234.5 in all", ["1234.50"]) == 1.0
    assert open_match("about 12", ["12.5"]) == 0.0


def test_without_java_the_result_says_so(monkeypatch):
    monkeypatch.setattr(captioning, "java", lambda: nullcontext(False))
    corpus, each = captioning.caption_scores(["a small owl"], [["a small owl", "an owl, small"]])
    assert "METEOR" not in corpus
    assert "METEOR" not in each
    assert "no Java" in corpus["tokenizer"]


def test_java_is_on_the_path_only_while_it_is_needed():
    before = os.environ["PATH"]
    with captioning.java() as there:
        assert there
    assert os.environ["PATH"] == before


def test_clipscore_by_hand():
    """2.5 × cosine, floored at 0; the reference's form is a harmonic mean with the best reference (equations 1, 2)."""
    images, captions = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[0.6, 0.8], [-1.0, 0.0]])
    found = captioning.clip_scores(images, captions, [np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.0]])])
    assert found["CLIPScore"] == pytest.approx([1.5, 0.0])
    assert found["RefCLIPScore"] == pytest.approx([2 * 1.5 * 0.8 / 2.3, 0.0])


def test_interval_covers_the_mean_and_widens_with_groups():
    values = np.repeat(np.random.default_rng(0).normal(1.0, 1.0, 40), 5)
    alone, grouped = bootstrap_interval(values), bootstrap_interval(values, np.repeat(np.arange(40), 5))
    assert alone[0] < values.mean() < alone[1]
    assert grouped[1] - grouped[0] > 1.5 * (alone[1] - alone[0])


def test_a_metric_resampled_by_units_has_the_interval_of_its_mean():
    values = np.random.default_rng(1).normal(0.0, 1.0, 200)
    rows = [{"score": value, "unit": str(number // 2)} for number, value in enumerate(values)]
    found = resamples(rows, lambda row: row["unit"], lambda some: float(np.mean([row["score"] for row in some])))
    expected = bootstrap_interval(values, np.arange(200) // 2)
    assert found == pytest.approx(expected, abs=0.05)
