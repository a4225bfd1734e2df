"""Every benchmark reads its official layout, scores right answers full, and names what is missing."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from official import WRITERS

from pipelines.evaluation import captioning
from pipelines.evaluation.benchmarks import BENCHMARKS, named
from pipelines.evaluation.benchmarks.owleval import by_ability
from pipelines.evaluation.evaluate import read_questions, split_hash
from pipelines.evaluation.plan import conversations, sample, shown
from pipelines.evaluation.results import score_predictions
from pipelines.settings import OwlError, SettingError

LENIENT = ("pope", "mathvista")
"""Whatever is not no counts as yes; the nearest choice is taken."""
OPEN = ("mm_vet", "llava_bench", "owleval")
ASKED = sorted(name for name, benchmark in BENCHMARKS.items() if benchmark.read)


def test_every_benchmark_has_its_files_here():
    assert sorted(WRITERS) == ASKED


def rows_of(name: str, folder: Path, answers: list[str]) -> list[dict]:
    questions = read_questions(BENCHMARKS[name], str(folder))
    return [{**q.facts, "prediction": text, "unit": q.unit} for q, text in zip(questions, answers, strict=True)]


@pytest.mark.parametrize("name", [name for name in ASKED if name not in OPEN])
def test_right_answers_score_full_and_wrong_ones_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setattr(captioning, "java", lambda: nullcontext(False))  # test_metrics has its share of starting Java
    benchmark, right = BENCHMARKS[name], WRITERS[name](tmp_path)
    for answers, expected in ((right, True), (["xyzzy of nowhere"] * len(right), False)):
        rows = rows_of(name, tmp_path, answers)
        scored = [{**row, "score": score} for row, score in zip(rows, benchmark.scores(rows), strict=True)]
        value = benchmark.metrics(scored)[benchmark.headline]
        if benchmark.headline == "CIDEr":
            assert value > 1 if expected else value < 0.01
        elif expected:
            assert value == pytest.approx(benchmark.most, rel=0.03)
        elif name not in LENIENT:
            assert value == 0


@pytest.mark.parametrize("name", ASKED)
def test_questions_are_asked_in_order_with_their_pictures(name, tmp_path):
    WRITERS[name](tmp_path)
    questions = read_questions(BENCHMARKS[name], str(tmp_path))
    assert len({q.id for q in questions}) == len(questions)
    assert split_hash(questions) == split_hash(read_questions(BENCHMARKS[name], str(tmp_path)))
    for question in questions:
        parts = [p for m in question.messages for p in (m["content"] if isinstance(m["content"], list) else [])]
        assert sum(part["type"] == "image" for part in parts) == len(question.pictures)
        assert all(part["text"] for part in parts if part["type"] == "text")
        assert json.dumps(question.facts)
        assert all(isinstance(path, bytes) or os.path.exists(path) for path in question.pictures)
    assert len(shown(questions, "picture")) == len(questions)


@pytest.mark.parametrize("name", ASKED)
def test_a_missing_file_is_named_with_the_place_where_it_is_published(name, tmp_path):
    with pytest.raises(OwlError) as error:
        read_questions(BENCHMARKS[name], str(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert BENCHMARKS[name].source in str(error.value)


def test_a_missing_picture_is_named(tmp_path):
    WRITERS["vqav2"](tmp_path)
    shutil.rmtree(tmp_path / "val2014")
    with pytest.raises(OwlError, match=r"COCO_val2014_000000000007\.jpg: vqav2 reads"):
        read_questions(BENCHMARKS["vqav2"], str(tmp_path))


def test_names_are_forgiving_but_not_silent():
    assert named("MM-Vet") is BENCHMARKS["mm_vet"]
    with pytest.raises(SettingError, match="unknown benchmark 'texvqa'; did you mean 'textvqa'"):
        named("texvqa")


def test_prompts_follow_mplug_owl2(tmp_path):
    WRITERS["mmbench"](tmp_path)
    first, second, third, *_ = read_questions(BENCHMARKS["mmbench"], str(tmp_path))
    text = "N/A\nWhich bird is it?\nA. owl\nB. tit\nC. jay\nAnswer with the option's letter from the given choices "
    assert first.messages[0]["content"][1]["text"] == text + "directly."
    assert [q.facts["choices"] for q in (first, second, third)] == [
        ["owl", "tit", "jay"],
        ["tit", "jay", "owl"],
        ["jay", "owl", "tit"],
    ]
    assert [q.facts["answer"] for q in (first, second, third)] == ["B", "A", "C"]


def test_one_wrong_order_loses_the_whole_question(tmp_path):
    right = WRITERS["mmbench"](tmp_path)
    rows = rows_of("mmbench", tmp_path, [right[0], "C", *right[2:]])
    metrics = score_predictions("mmbench", rows)
    assert metrics == {"accuracy": 50.0, "vanilla": 100.0, "birds": 0.0, "trees": 100.0}


def test_a_follow_up_question_comes_in_its_conversation(tmp_path):
    WRITERS["owleval"](tmp_path)
    questions = read_questions(BENCHMARKS["owleval"], str(tmp_path))
    turns = conversations(shown(questions, "picture"))
    assert [[turn["id"] for turn in chain] for chain in turns] == [["1"], ["2", "3"]]
    assert turns[1][1]["pictures"] == []
    assert [q.id for q in sample(questions, 1)] == ["1"]


def test_grades_are_counted_by_ability():
    rows = [
        {"abilities": ["a", "f"], "turns": ["multi_turn"], "grade": "A"},
        {"abilities": ["a"], "turns": ["single_turn"], "grade": {"B": 0.5, "D": 0.5}},
    ]
    found = by_ability(rows)
    assert (found["A and B"], found["A"], found["B"], found["D"], found["answers"]) == (1.5, 1.0, 0.5, 0.5, 2)
    assert found["abilities"]["Multi-turn dialogue"]["A and B"] == 1.0
    assert found["turns"]["single_turn"]["D"] == 0.5


def test_predictions_without_what_the_metric_needs_are_refused():
    with pytest.raises(OwlError, match="textvqa needs 'answers' in every line; the first has prediction"):
        score_predictions("textvqa", [{"prediction": "x"}])
