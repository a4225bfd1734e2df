"""OwlEval: mPLUG-Owl's own 82 questions about 50 pictures, graded A to D by people, in six abilities."""

import re

from pipelines.evaluation.benchmarks.base import Benchmark, Question, Rubric, ask, each, read_lines

ABILITIES = {
    "a": "Instruction understanding",
    "b": "Visual understanding",
    "c": "Optical character recognition",
    "d": "Knowledge transfer",
    "e": "Reasoning",
    "f": "Multi-turn dialogue",
}
GRADES = {
    "A": "right and satisfying",
    "B": "acceptable, with small flaws",
    "C": "understood the instruction, with significant errors",
    "D": "irrelevant or wrong",
}
"""After Wang et al. 2022 (Self-Instruct), as mPLUG-Owl's section 4.2 takes them over."""
POINTS = {"A": 1.0, "B": 2 / 3, "C": 1 / 3, "D": 0.0}
PROMPT = (
    "A person asked about a picture, and an assistant answered. Grade the answer by one letter:\n"
    + "\n".join(f"{grade}: {meaning}" for grade, meaning in GRADES.items())
    + "\n\n[Question]\n{question}\n\n[Answer]\n{prediction}\n\nSay only the letter."
)


def read(folder: str) -> list[Question]:
    rows = read_lines(f"{folder}/questions.jsonl")
    before: dict[str, str] = {}  # the last turn about each picture
    questions = []
    for row in rows:
        abilities = [letter.strip() for letter in row["ability"].split(",")]
        several = "multi_turn" in row["category"]
        follows = before.get(row["image"], "") if several else ""
        facts = {"question": row["question"], "abilities": abilities, "turns": row["category"]}
        id = str(row["question_id"])
        messages = ask(row["question"], 0 if follows else 1)
        pictures = [] if follows else [f"{folder}/cases/{row['image']}"]
        kind = "multi-turn" if several else "single-turn"
        questions.append(Question(id, messages, pictures, facts, kind, row["image"], follows=follows))
        if several:
            before[row["image"]] = id
    return questions


def by_ability(rows: list[dict]) -> dict:
    """How many answers got each grade, A and B together as the paper counts them, and the same for each ability, single
    turns and several turns."""
    graded = [row for row in rows if row.get("grade")]
    made: dict = counted(graded)
    made["abilities"] = {
        ABILITIES[letter]: counted([row for row in graded if letter in row["abilities"]]) for letter in ABILITIES
    }
    made["turns"] = {
        kind: counted([row for row in graded if kind in row["turns"]]) for kind in ("single_turn", "multi_turn")
    }
    return made


def shares(metrics: dict) -> dict[str, float]:
    """Of each ability, the share of A and B."""
    return {name: part["A and B"] / max(1, part["answers"]) for name, part in metrics["abilities"].items()}


def counted(rows: list[dict]) -> dict:
    """A grade that is shared between raters who differ counts in parts; see rating.py."""
    shares = [row["grade"] if isinstance(row["grade"], dict) else {row["grade"]: 1.0} for row in rows]
    counts = {grade: sum(share.get(grade, 0.0) for share in shares) for grade in GRADES}
    return {"A and B": counts["A"] + counts["B"], **counts, "answers": len(rows)}


def score(row: dict) -> float | None:
    """A is 1, D is 0."""
    grade = row.get("grade")
    if not grade:
        return None
    return POINTS[grade] if isinstance(grade, str) else sum(POINTS[one] * part for one, part in grade.items())


def read_grade(words: str) -> dict | None:
    found = re.search(r"\b([A-D])\b", words)
    return {"grade": found[1]} if found else None


BENCHMARK = Benchmark(
    version="owleval/1 grades A to D",
    about="82 questions about 50 pictures, graded by people (mPLUG-Owl, section 4.2); a follow-up question is asked in "
    "its conversation.",
    source="https://github.com/X-PLUG/mPLUG-Owl/tree/main/mPLUG-Owl/OwlEval",
    layout="questions.jsonl cases/ answer/",
    read=read,
    scores=each(score),
    metrics=by_ability,
    headline="A and B",
    recount=True,
    most=82,
    max_new_tokens=512,
    published={"mPLUG-Owl": 66, "MiniGPT-4": 54},
    abilities=shares,
    rubric=Rubric(version="owleval/1, the judge sees the picture", prompt=PROMPT, shows_pictures=True, read=read_grade),
)
