"""MMBench: choices in every order; a question counts only if all of its orders are answered rightly."""

from pipelines.evaluation.benchmarks.base import (
    LETTER,
    LETTERS_RIGHT,
    Benchmark,
    Question,
    ask,
    from_base64,
    percent,
    read_table,
)
from pipelines.evaluation.metrics import LETTERS, lettered, mean

FILE = "mmbench_dev_20230712.tsv"


def read(folder: str) -> list[Question]:
    rows = read_table(f"{folder}/{FILE}", "\t")
    pictures = {row["index"]: row["image"] for row in rows}
    return [question for row in rows for question in turned(row, picture_of(row["image"], pictures))]


def picture_of(field: str, pictures: dict[str, str]) -> bytes:
    """The picture, or that of the row whose number stands in its place."""
    return from_base64(pictures.get(field, field))


def turned(row: dict, picture: bytes) -> list[Question]:
    """A question with its choices turned on by one place each time (circular evaluation; Liu et al. 2023, 4.1)."""
    letters = [letter for letter in "ABCD" if row.get(letter) not in (None, "", "nan")]
    choices, right = [row[letter] for letter in letters], letters.index(row["answer"])
    made = []
    for turn in range(len(choices)):
        order = choices[turn:] + choices[:turn]
        hint = row["hint"] if row.get("hint") not in (None, "", "nan") else "N/A"
        answer = LETTERS[(right - turn) % len(order)]
        facts = {"index": row["index"], "turn": turn, "answer": answer, "choices": order, "category": row["category"]}
        text = f"{hint}\n{row['question']}\n{lettered(order)}\n{LETTER}"
        id = f"{row['index']}-{turn}"
        kind, letters_now = row["category"], tuple(LETTERS[: len(order)])
        made.append(Question(id, ask(text), [picture], facts, kind, row["index"], letters_now))
    return made


def circular(rows: list[dict]) -> dict:
    """Accuracy where all orders must be right, by category too; "vanilla" is that of the first order alone."""
    orders: dict[object, list[dict]] = {}
    for row in rows:
        orders.setdefault((row["index"], row.get("copy")), []).append(row)
    right = [(some[0]["category"], all(row["score"] for row in some)) for some in orders.values()]
    kinds = sorted({kind for kind, _ in right})
    made = {"accuracy": 100 * mean([passed for _, passed in right])}
    made["vanilla"] = percent([row for row in rows if row["turn"] == 0])
    return made | {kind: 100 * mean([passed for name, passed in right if name == kind]) for kind in kinds}


BENCHMARK = Benchmark(
    version="mmbench/1 circular accuracy",
    about="1,164 questions of the English development split in up to four orders; prompt of mPLUG-Owl2's script.",
    source="https://github.com/open-compass/MMBench",
    layout=FILE,
    read=read,
    scores=LETTERS_RIGHT,
    metrics=circular,
    recount=True,
    published={
        "mPLUG-Owl2": 64.5,
        "mPLUG-Owl": 46.6,
        "LLaVA-1.5-7B": 64.3,
        "LLaVA-1.5-13B": 67.7,
        "InstructBLIP-7B": 36.0,
        "Qwen-VL-Chat": 60.6,
    },
)
