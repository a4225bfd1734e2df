"""Answers → scores, each as its benchmark's authors compute it. All take texts and give numbers; none needs a model.

Where an official evaluator has a quirk, it is kept, since a figure that nobody else gets compares with nothing;
docs/benchmarks.md holds each to predictions whose score was published.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein

# --- one right answer -----------------------------------------------------------------------------------------------


def final_answer(text: str) -> str:
    """What an answer comes to: after its last "so", lower case, without a closing full stop."""
    words = text.lower().replace(" .", "").strip(" .").split()
    last = max((index for index, word in enumerate(words) if word == "so"), default=-1)
    return " ".join(words[last + 1 :])


def exact_match(answer: str, expected: str) -> float:
    return float(final_answer(answer) == final_answer(expected))


def relaxed_match(answer: str, expected: str, tolerance: float = 0.05) -> float:
    """ChartQA's (Masry et al. 2022, section 5.1): numbers may be 5 % off, words must be the same."""
    given, wanted = as_number(answer), as_number(expected)
    if given is not None and wanted:
        return float(abs(given - wanted) / abs(wanted) <= tolerance)
    return float(answer.strip().strip(".").lower() == expected.strip().lower())


def as_number(text: str) -> float | None:
    text = text.strip().rstrip(".").replace(",", "")
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls(answer: str, accepted: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalized Levenshtein similarity, of one answer (Biten et al. 2019, equation 1): the likeness to the
    nearest accepted answer, and nothing where half or more must be changed."""
    given = " ".join(answer.lower().split())
    apart = min(Levenshtein.normalized_distance(given, " ".join(text.lower().split())) for text in accepted)
    return 1 - apart if apart < threshold else 0.0


# --- ten people's answers -------------------------------------------------------------------------------------------

NUMBERS = dict(
    zip(["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], "00123456789")
) | {"ten": "10"}
ARTICLES = ("a", "an", "the")
MARKS = ';/[]"{}()=+\\_->< @`,?!'.replace(" ", "")
APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""


def without_one(word: str) -> list[str]:
    """The word with each of its apostrophes left out in turn."""
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {spelt: word for word in APOSTROPHES.split() for spelt in without_one(word)} | {
    "somebody'd": "somebodyd"
}


def without_marks(text: str) -> str:
    """The official evaluator's treatment of punctuation: a mark beside a space goes, any other becomes a space."""
    out = text
    for mark in MARKS:
        beside_space = mark + " " in text or " " + mark in text or re.search(r"\d,\d", text)
        out = out.replace(mark, "" if beside_space else " ")
    return re.sub(r"\.(?!\d)", "", out, count=32)  # 32: the value of re.UNICODE, which they pass as a count


def without_articles(text: str) -> str:
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """VQA accuracy (Antol et al. 2015, section 3; github.com/GT-Vision-Lab/VQA): a third for every other person who
    said so, at most one, over each of the people left out in turn. Their answers are normalized only where they differ,
    as in the official evaluator."""
    given = without_articles(without_marks(" ".join(answer.split())))
    people = [without_marks(text) for text in people] if len(set(people)) > 1 else list(people)
    return leave_one_out(given, people)


def textvqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """The same with the normalization of TextVQA's evaluator (MMF's M4C), which lowers case and sets a possessive s
    apart first, and treats people's answers as the model's."""
    return leave_one_out(textvqa_words(answer), [textvqa_words(text) for text in people])


def textvqa_words(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return without_articles(without_marks(text.replace("\n", " ").replace("\t", " ").strip()))


def leave_one_out(given: str, people: Sequence[str]) -> float:
    same = sum(text == given for text in people)
    scores = [min(1.0, (same - (text == given)) / 3) for text in people]
    return sum(scores) / len(scores)


# --- yes or no ------------------------------------------------------------------------------------------------------


def pope_yes(answer: str) -> bool:
    """What POPE's evaluator reads: the first sentence says yes unless it holds "No", "no" or "not" as a word."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & {*words}


def mme_word(answer: str) -> str:
    """What MME's calculation.py reads: "yes", "no" or "other", by the first four characters."""
    text = answer.strip().lower()
    return next((word for word in ("yes", "no") if text == word or word in text[:4]), "other")


def found(truth: Sequence[bool], said: Sequence[bool]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of "yes" in percent, and the share of yes."""
    true, yes = np.asarray(truth, bool), np.asarray(said, bool)
    hits = int((true & yes).sum())
    precision, recall = hits / max(1, yes.sum()), hits / max(1, true.sum())
    return {
        "f1": float(200 * precision * recall / max(1e-12, precision + recall)),
        "accuracy": 100 * float((true == yes).mean()),
        "precision": float(100 * precision),
        "recall": float(100 * recall),
        "yes_ratio": float(yes.mean()),
    }


# --- one of several -------------------------------------------------------------------------------------------------

LETTERS = string.ascii_uppercase


def lettered(choices: Sequence[str]) -> str:
    """ "A. first\nB. second", as prompts show them."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def chosen(answer: str, choices: Sequence[str]) -> str:
    """The letter that an answer means: given alone or first, after "answer is", as the only capital that stands by
    itself, or by the one choice whose words it says. "" where it cannot be told, which counts as wrong."""
    text, letters = answer.strip(), LETTERS[: len(choices)]
    marked = re.match(rf"\(?([{letters}])(?:[).:,\s]|$)", text)
    if marked and not re.match(r"(A|I) [a-z]", text):  # "A dog …" is no choice of A
        return marked[1]
    if told := re.search(rf"[Aa]nswer(?: is|:)?\s*\(?([{letters}])\b", text):
        return told[1]
    alone = {*re.findall(rf"\(([{letters}])\)|\b([{letters}])\b(?! [a-z])", text)}
    names = {one or other for one, other in alone}
    if len(names) == 1:
        return names.pop()
    said = [letter for letter, choice in zip(letters, choices, strict=True) if says(text, choice)]
    return said[0] if len(said) == 1 else ""


def says(text: str, words: str) -> bool:
    """Whether a text holds these words, as words."""
    return re.search(rf"(?<!\w){re.escape(words.strip())}(?!\w)", text, re.IGNORECASE) is not None


def scienceqa_letter(answer: str) -> str:
    """What LLaVA's eval_science_qa.py reads: the letter alone, "A. …", or "The answer is A."; else "FAILED"."""
    text = answer.strip()
    if re.fullmatch("[A-E]", text) or re.match(r"[A-E]\. ", text):
        return text[0]
    told = re.findall(r"The answer is ([A-Z])\.", text)
    return told[0] if len(told) == 1 else "FAILED"


def mathvista_value(extraction: str | None, row: Mapping) -> str | None:
    """MathVista's calculate_score.py: an extracted answer in the form that the right one is written in. A fraction
    where a whole number is due has none, as in the runs its authors published (later versions cut it off)."""
    choices, text = row["choices"], str("" if extraction is None else extraction).strip()
    if row["question_type"] == "multi_choice":
        letter = re.findall(r"\(([a-zA-Z])\)", text)
        name = letter[0].upper() if letter else text
        if len(name) == 1 and name in LETTERS[: len(choices)]:
            return choices[LETTERS.index(name)]
        return min(choices, key=lambda choice: Levenshtein.distance(name, choice))
    try:
        if row["answer_type"] == "integer":
            return str(int(text))
        if row["answer_type"] == "float":
            return str(round(float(text), int(row["precision"])))
        return text
    except (ValueError, TypeError, OverflowError):
        return None


def open_match(answer: str, accepted: Sequence[str]) -> float:
    """MMMU's rule for open questions: the right number, to two digits, is among the answer's numbers, or the right
    words are in it (Yue et al. 2023, appendix; without their search for the sentence that concludes)."""
    given = answer.lower()
    numbers = {round(float(text.replace(",", "")), 2) for text in re.findall(r"-?\d[\d,]*\.?\d*", given)}
    for right in accepted:
        value = as_number(right)
        if value is not None and round(value, 2) in numbers:
            return 1.0
        if value is None and right.strip().lower() in given:
            return 1.0
    return 0.0


# --- how sure -------------------------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def bootstrap_interval(values: np.ndarray, groups: np.ndarray | None = None, rounds: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean, by resampling values, or whole groups of them (such as one photograph's captions)."""
    if groups is not None:
        _, members = np.unique(groups, return_inverse=True)
        sums, sizes = np.bincount(members, values), np.bincount(members).astype(np.float64)
    else:
        sums, sizes = values, np.ones(len(values))
    random = np.random.default_rng(0)
    means = []
    for _ in range(rounds):
        picks = random.integers(len(sums), size=len(sums))
        means.append(sums[picks].sum() / sizes[picks].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def resamples(rows: Sequence[dict], unit: Callable[[dict], object], metric: Callable, rounds: int = 300):
    """95 % interval of what ``metric`` makes of rows, by resampling whole units (a picture's questions). A unit that is
    drawn twice has rows with another "copy"."""
    members: dict[object, list[dict]] = {}
    for row in rows:
        members.setdefault(unit(row), []).append(row)
    groups, random = list(members.values()), np.random.default_rng(0)
    values = []
    for _ in range(rounds):
        picks = random.integers(len(groups), size=len(groups))
        values.append(metric([{**row, "copy": at} for at, pick in enumerate(picks) for row in groups[pick]]))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
