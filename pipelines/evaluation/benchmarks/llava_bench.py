"""LLaVA-Bench (in the wild): open questions; a language model grades the answer beside GPT-4's."""

from pipelines.evaluation.benchmarks.base import Benchmark, Question, Rubric, ask, each, read_lines
from pipelines.evaluation.metrics import mean

PROMPT = """[Context]
{context}

[Question]
{question}

[Assistant 1]
{reference}

[End of Assistant 1]

[Assistant 2]
{prediction}

[End of Assistant 2]

[System]
Two assistants answered the question above about a picture, which the context describes to you. Grade how helpful, \
relevant, accurate and detailed each answer is, from 1 to 10; higher is better. Write the two grades, of assistant 1 \
and of assistant 2, on the first line, with a space between them and nothing else. Explain them from the second line \
on. Do not let the order of the answers count."""


def read(folder: str) -> list[Question]:
    context = {row["image"]: row["caption"] for row in read_lines(f"{folder}/context.jsonl")}
    gold = {row["question_id"]: row["text"] for row in read_lines(f"{folder}/answers_gpt4.jsonl")}
    return [
        Question(
            str(row["question_id"]),
            ask(row["text"]),
            [f"{folder}/images/{row['image']}"],
            {
                "question": row["text"],
                "category": f"llava_bench_{row['category']}",
                "context": context[row["image"]],
                "reference": gold[row["question_id"]],
            },
            row["category"],
            row["image"],
        )
        for row in read_lines(f"{folder}/questions.jsonl")
    ]


def pair(review: str) -> tuple[float, float] | None:
    """The two grades on a review's first line: the reference's, the model's."""
    words = review.strip().split("\n")[0].replace(",", " ").split()
    try:
        first, second = map(float, words)
        return first, second
    except ValueError:
        return None


def relative(rows: list[dict]) -> dict:
    """The model's grades by the reference's, in percent: of each run of the judge, their mean, and by category."""
    graded = [(row, found) for row in rows if "content" in row and (found := pair(row["content"]))]

    def ratio(some: list[tuple[dict, tuple[float, float]]]) -> float:
        return 100 * sum(model for _, (_, model) in some) / max(1e-9, sum(gold for _, (gold, _) in some))

    runs = sorted({row.get("run", 1) for row, _ in graded})
    made: dict = {"runs": [ratio([one for one in graded if one[0].get("run", 1) == run]) for run in runs]}
    made["mean"] = mean(made["runs"])
    for kind in sorted({row["category"] for row, _ in graded}):
        made[kind] = ratio([one for one in graded if one[0]["category"] == kind])
    return made


def score(row: dict) -> float | None:
    """A tenth of the model's grade."""
    found = pair(row["content"]) if "content" in row else None
    return found[1] / 10 if found else None


BENCHMARK = Benchmark(
    version="llava_bench/1 grades relative to the reference's",
    about="60 questions about 24 pictures (Liu et al. 2023). Published figures were graded by GPT-4 of 2023; another "
    "judge gives others.",
    source="https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild",
    layout="questions.jsonl context.jsonl answers_gpt4.jsonl images/",
    read=read,
    scores=each(score),
    metrics=relative,
    headline="mean",
    recount=True,
    max_new_tokens=512,
    published={"LLaVA-1.5-7B": 65.4, "LLaVA-1.5-13B": 72.5, "BLIP-2": 38.1, "InstructBLIP-7B": 60.9},
    rubric=Rubric(
        version="llava_bench/1, own wording",
        prompt=PROMPT,
        read=lambda words: {"run": 1, "content": words} if pair(words) else None,
    ),
)
