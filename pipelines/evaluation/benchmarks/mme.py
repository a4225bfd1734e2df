"""MME: two questions a picture, one to be answered yes and one no; perception and cognition in fourteen tasks."""

from pipelines import storage
from pipelines.evaluation.benchmarks.base import WORD, Benchmark, Question, ask, each
from pipelines.evaluation.metrics import mme_word
from pipelines.settings import OwlError

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
ASKED = "Please answer yes or no."


def read(folder: str) -> list[Question]:
    return [question for task in (*PERCEPTION, *COGNITION) for question in read_task(f"{folder}/{task}", task)]


def read_task(folder: str, task: str) -> list[Question]:
    """A task's pictures and, by the same names, a question and its answer a line; in some tasks each has a folder."""
    apart = storage.exists(f"{folder}/questions_answers_YN")
    texts = storage.listing(f"{folder}/questions_answers_YN" if apart else folder, ".txt")
    if not texts:
        raise FileNotFoundError(f"{folder}/*.txt")
    shown = f"{folder}/images" if apart else folder
    pictures = {
        storage.name_of(path).rpartition(".")[0]: path
        for ending in (".jpg", ".png", ".jpeg")
        for path in storage.listing(shown, ending)
    }
    questions = []
    for path in texts:
        name = storage.name_of(path).removesuffix(".txt")
        if name not in pictures:
            raise OwlError(f"{path} has no picture beside it in {shown}")
        lines = [line.split("\t") for line in storage.read_bytes(path).decode().splitlines() if line.strip()]
        for number, (text, answer) in enumerate(lines):
            facts = {"category": task, "image": name, "question": text, "answer": answer.strip()}
            prompt = f"{text.replace(ASKED, '').strip()}\n{WORD}"
            id = f"{task}/{name}/{number}"
            questions.append(Question(id, ask(prompt), [pictures[name]], facts, task, f"{task}/{name}"))
    return questions


def totals(rows: list[dict]) -> dict[str, float]:
    """Of each task, accuracy by question plus accuracy by picture, whose two questions both must be right: 200 at most.
    Perception and cognition are sums (Fu et al. 2023, section 2.3)."""
    made = {}
    for task in (*PERCEPTION, *COGNITION):
        pictures: dict[object, list[float]] = {}
        for row in rows:
            if row["category"] == task:
                pictures.setdefault((row["image"], row.get("copy")), []).append(row["score"])
        if pictures:
            scores = [score for pair in pictures.values() for score in pair]
            both = [all(pair) for pair in pictures.values()]
            made[task] = 100 * sum(scores) / len(scores) + 100 * sum(both) / len(both)
    made["perception"] = sum(made.get(task, 0) for task in PERCEPTION)
    made["cognition"] = sum(made.get(task, 0) for task in COGNITION)
    return made


BENCHMARK = Benchmark(
    version="mme/1 accuracy and accuracy+, as calculation.py",
    about="2,374 questions about 1,187 pictures; asked as mPLUG-Owl2's script asks.",
    source="https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation",
    layout="a folder for each task: NAME.jpg|png with NAME.txt, or images/ and questions_answers_YN/",
    read=read,
    scores=each(lambda row: float(mme_word(row["prediction"]) == row["answer"].strip().lower())),
    metrics=totals,
    headline="perception",
    recount=True,
    most=2000,
    published={
        "mPLUG-Owl2": 1450.19,
        "mPLUG-Owl": 967.34,
        "LLaVA-1.5-7B": 1510.7,
        "LLaVA-1.5-13B": 1531.3,
        "BLIP-2": 1293.8,
        "Qwen-VL-Chat": 1487.5,
    },
)
