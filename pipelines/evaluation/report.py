"""report.html of an evaluation: accuracy by type beside the controls, and pictures with answers, wrong ones first."""

from __future__ import annotations

from markupsafe import Markup

from pipelines import storage
from pipelines.evaluation.metrics import Question
from pipelines.page import figure, numbers, page, pictures, section, table

SHOWN = 24
HEAD = ("type", "questions", "right picture", "95 % interval", "another picture", "no picture")


def write_report(path: str, results: dict, questions: list[Question], answers: list[dict]) -> None:
    scores = results["scores"]
    overall = scores["picture"]["all"]
    lead = f"{results['benchmark']} · {results['model']}"
    asked = {"accuracy": f"{overall['accuracy']:.1%}", "questions": f"{overall['n']:,}"}
    parts = [
        section("Overall", numbers(asked)),
        section("By type", score_table(scores)),
        section("Answers", pictures(examples(questions, answers))),
    ]
    storage.write_text(path, page("Evaluation", lead, *parts))


def score_table(scores: dict) -> Markup:
    return table(HEAD, score_rows(scores))


def score_rows(scores: dict) -> list[tuple[str, ...]]:
    """Types down, conditions across; an interval of 95 % beside the accuracy."""
    rows = []
    for kind, entry in scores["picture"].items():
        controls = [scores.get(name, {}).get(kind) for name in ("wrong picture", "no picture")]
        cells = [f"{control['accuracy']:.1%}" if control else "–" for control in controls]
        interval = f"{entry['low']:.1%} – {entry['high']:.1%}"
        rows.append((kind.replace("_", " "), f"{entry['n']:,}", f"{entry['accuracy']:.1%}", interval, *cells))
    return rows


def examples(questions: list[Question], answers: list[dict]) -> list[Markup]:
    """Half wrong answers, half right ones, as far as there are that many."""
    by_id = {question.id: question for question in questions}
    shown = [row for row in answers if row["condition"] == "picture" and by_id[row["id"]].pictures]
    wrong = [row for row in shown if not row["score"]][: SHOWN // 2]
    right = [row for row in shown if row["score"]]
    spread = right[:: max(1, len(right) // (SHOWN - len(wrong)))][: SHOWN - len(wrong)]
    return [answered(by_id[row["id"]], row) for row in [*wrong, *spread]]


def answered(question: Question, row: dict) -> Markup:
    kind = "right" if row["score"] else "wrong"
    caption = Markup('{}<br><span class="{}">{}</span>').format(row["prompt"], kind, row["answer"])
    if not row["score"]:
        caption += Markup("<br>expected: {}").format(row["expected"])
    images = []
    for path in question.pictures:
        with storage.open_read(path) as file:
            images.append(file.read())
    return figure(images, caption)
