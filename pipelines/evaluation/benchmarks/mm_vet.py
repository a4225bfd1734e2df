"""MM-Vet: open questions that need several abilities at once, graded from 0 to 1 by a language model."""

import re

from pipelines.evaluation.benchmarks.base import Benchmark, Question, Rubric, ask, each, read_json
from pipelines.evaluation.metrics import mean

ABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
PROMPT = """Compare the ground truth with a model's prediction and give the prediction a correctness score.
<AND> in the ground truth means that it is totally right only when all of its elements are in the prediction, <OR> \
that it is totally right when any one of them is. The score is one of 0.0 (totally wrong), 0.1, 0.2, … 0.9, 1.0 \
(totally right).

Question | Ground truth | Prediction | Correctness
What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0
What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -5 or x = -1 | 1.0
{question} | {answer} | {prediction} |

Say only the score."""


def read(folder: str) -> list[Question]:
    return [
        Question(
            key,
            ask(row["question"]),
            [f"{folder}/images/{row['imagename']}"],
            {name: row[name] for name in ("question", "answer", "capability")},
            " ".join(sorted(row["capability"])),
            row["imagename"],
        )
        for key, row in read_json(f"{folder}/mm-vet.json").items()
    ]


def read_grade(words: str) -> dict | None:
    found = re.search(r"\b(?:0(?:\.\d+)?|1(?:\.0+)?)\b", words)
    return {"gpt4_scores": [float(found[0])]} if found else None


def by_ability(rows: list[dict]) -> dict:
    """Mean grade in percent: of each run of the judge, of all, and of the questions that need an ability."""
    graded = [row for row in rows if row.get("gpt4_scores")]
    runs = [100 * mean(scores) for scores in zip(*(row["gpt4_scores"] for row in graded), strict=True)]
    made: dict = {"runs": runs, "mean": mean(runs)}
    for ability in ABILITIES:
        made[ability] = 100 * mean([mean(row["gpt4_scores"]) for row in graded if ability in row["capability"]])
    return made


BENCHMARK = Benchmark(
    version="mm_vet/1 mean of a judge's grades",
    about="218 questions about 200 pictures, with six abilities in sixteen combinations (Yu et al. 2023). Published "
    "figures were graded by GPT-4; another judge gives others.",
    source="https://github.com/yuweihao/MM-Vet",
    layout="mm-vet.json images/",
    read=read,
    scores=each(lambda row: mean(row["gpt4_scores"]) if row.get("gpt4_scores") else None),
    metrics=by_ability,
    headline="mean",
    max_new_tokens=256,
    published={
        "mPLUG-Owl2": 36.2,
        "LLaVA-1.5-7B": 31.1,
        "LLaVA-1.5-13B": 36.1,
        "InstructBLIP-7B": 26.2,
        "BLIP-2": 22.4,
    },
    abilities=lambda metrics: {ability: metrics[ability] / 100 for ability in ABILITIES},
    rubric=Rubric(version="mm_vet/1, own wording and examples", prompt=PROMPT, read=read_grade),
)
