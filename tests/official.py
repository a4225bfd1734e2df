"""Every benchmark's official files, in small: a few rows of our own making in the layout that its owners publish."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

TEN = ["red"] * 8 + ["dark red", "crimson"]


def picture(path: Path, colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (colour % 256, 90, 160)).save(path)


def png(colour: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (colour % 256, 90, 160)).save(file, "PNG")
    return file.getvalue()


def dump(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))


def table(path: Path, rows: list[list], separator: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)


def parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def karpathy(folder: Path, file: str, pictures: str, filepath: str = "") -> list[str]:
    images = []
    for number in range(3):
        name = f"COCO_val2014_{number:012d}.jpg"
        picture(folder / pictures / filepath / name, number)
        sentences = [{"raw": f"a {word} dog runs over the green grass number {number}"} for word in ("brown", "happy")]
        row = {"imgid": number, "cocoid": number + 100, "filename": name, "split": "test" if number else "train"}
        images.append({**row, "sentences": sentences} | ({"filepath": filepath} if filepath else {}))
    dump(folder / file, {"images": images})
    return [f"a brown dog runs over the green grass number {number}" for number in (1, 2)]


def coco_caption(folder: Path) -> list[str]:
    return karpathy(folder, "dataset_coco.json", "", "val2014")


def flickr30k(folder: Path) -> list[str]:
    return karpathy(folder, "dataset_flickr30k.json", "flickr30k-images")


def flickr8k(folder: Path) -> list[str]:
    return karpathy(folder, "dataset_flickr8k.json", "Flicker8k_Dataset")


def nocaps(folder: Path) -> list[str]:
    images = [{"id": n, "file_name": f"{n}.jpg", "domain": domain} for n, domain in enumerate(("in", "out"))]
    for row in images:
        picture(folder / "images" / row["file_name"], row["id"])
    told = [{"image_id": n, "caption": f"a small owl sits on a high branch number {n}"} for n in (0, 1)]
    dump(folder / "nocaps_val_4500_captions.json", {"images": images, "annotations": told})
    return [row["caption"] for row in told]


def vqa_files(folder: Path, questions: str, annotations: str) -> list[str]:
    asked = [{"image_id": 7, "question_id": 70 + n, "question": f"What colour is it, {n}?"} for n in (0, 1)]
    answers = [{"answer": answer, "answer_id": n} for n, answer in enumerate(TEN)]
    kinds = ("other", "yes/no")
    told = [{"question_id": 70 + n, "answers": answers, "answer_type": kinds[n]} for n in (0, 1)]
    picture(folder / "val2014/COCO_val2014_000000000007.jpg")
    dump(folder / questions, {"questions": asked})
    dump(folder / annotations, {"annotations": told})
    return ["Red", "the red."]


def vqav2(folder: Path) -> list[str]:
    return vqa_files(folder, "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json")


def okvqa(folder: Path) -> list[str]:
    return vqa_files(folder, "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json")


def gqa(folder: Path) -> list[str]:
    rows = {
        f"q{n}": {"question": "Is it red?", "answer": "yes", "imageId": "n1", "types": {"structural": kind}}
        for n, kind in enumerate(("verify", "query"))
    }
    picture(folder / "images/n1.jpg")
    dump(folder / "testdev_balanced_questions.json", rows)
    return ["Yes.", "yes"]


def vizwiz(folder: Path) -> list[str]:
    answers = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10
    rows = [{"image": f"{n}.jpg", "question": "What is this?", "answers": answers, "answerable": 0} for n in (0, 1)]
    for row in rows:
        picture(folder / "val" / row["image"])
    dump(folder / "val.json", rows)
    return ["Unanswerable", "unanswerable"]


def textvqa(folder: Path) -> list[str]:
    row = {"question": "what brand is it?", "image_id": "ab", "answers": ["nokia's"] * 10}
    picture(folder / "train_images/ab.jpg")
    dump(folder / "TextVQA_0.5.1_val.json", {"data": [{**row, "question_id": 1}, {**row, "question_id": 2}]})
    dump(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [{"image_id": "ab", "ocr_tokens": ["NOKIA", "n70"]}]})
    return ["Nokia's", "nokia's"]


def scienceqa(folder: Path) -> list[str]:
    base = {"question": "Which is an animal?", "choices": ["owl", "oak"], "answer": 0, "hint": "Think."}
    picture(folder / "test/1/image.png")
    dump(folder / "problems.json", {"1": {**base, "image": "image.png"}, "2": {**base, "image": None, "hint": ""}})
    dump(folder / "pid_splits.json", {"test": ["1", "2"]})
    return ["A", "The answer is A."]


def docvqa(folder: Path) -> list[str]:
    row = {"question": "What is the date?", "image": "documents/a.png", "answers": ["May 3", "3 May"]}
    picture(folder / "documents/a.png")
    dump(folder / "val_v1.0_withQT.json", {"data": [{**row, "questionId": n} for n in (1, 2)]})
    return ["may 3", "3 May"]


def chartqa(folder: Path) -> list[str]:
    for kind in ("human", "augmented"):
        dump(folder / f"test/test_{kind}.json", [{"imgname": "a.png", "query": "How many?", "label": "100"}])
    picture(folder / "test/png/a.png")
    return ["104", "97"]


THINGS = ("cat", "dog")


def pope(folder: Path) -> list[str]:
    for split in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": n, "image": "a.jpg", "text": f"Is there a {w} in it?"} for n, w in ((1, "cat"), (2, "dog"))
        ]
        lines(folder / f"coco_pope_{split}.json", [{**row, "label": ("no", "yes")[n]} for n, row in enumerate(rows)])
    picture(folder / "val2014/a.jpg")
    return ["No, there is none.", "Yes"] * 3


def mme(folder: Path) -> list[str]:
    tasks = "existence count position color posters celebrity scene landmark artwork OCR commonsense_reasoning"
    names = (*tasks.split(), "numerical_calculation", "text_translation", "code_reasoning")
    for task in names:
        apart = task in ("posters", "artwork")
        picture(folder / task / ("images" if apart else "") / "0001.png")
        words = folder / task / ("questions_answers_YN" if apart else "") / "0001.txt"
        words.parent.mkdir(parents=True, exist_ok=True)
        ends = "Please answer yes or no."
        words.write_text(f"Is it an owl? {ends}\tYes\nIs it a cow? {ends}\tNo\n")
    return ["Yes", "no it is not"] * len(names)


def mmbench(folder: Path) -> list[str]:
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    shown = base64.b64encode(png()).decode()
    rows = [
        [1, "Which bird is it?", "", "owl", "tit", "jay", "", "B", "birds", shown],
        [2, "Which tree is it?", "It is old.", "oak", "elm", "", "", "A", "trees", shown],
    ]
    table(folder / "mmbench_dev_20230712.tsv", [head, *rows], "\t")
    return ["B", "A", "C", "A", "B"]


def seed_bench(folder: Path) -> list[str]:
    row = {"question": "Where is it?", "choice_a": "up", "choice_b": "down", "choice_c": "left", "choice_d": "right"}
    row |= {"answer": "C", "data_id": "1_2", "data_type": "image", "question_type_id": 1}
    rows = [{**row, "question_id": "1"}, {**row, "question_id": "2", "question_type_id": 2}]
    video = {**row, "question_id": "3", "data_type": "video"}
    dump(folder / "SEED-Bench.json", {"questions": [*rows, video], "question_type": {"Scene": 1, "Instance": 2}})
    picture(folder / "SEED-Bench-image/placeholder.png")
    (folder / "SEED-Bench-image/placeholder.png").rename(folder / "SEED-Bench-image/1_2")
    return ["C", "(C) left"]


def mmstar(folder: Path) -> list[str]:
    row = {"question": "Which? Options: A: up, B: down, C: left, D: right", "answer": "D", "image": png()}
    row |= {"l2_category": "x"}
    parquet(folder / "mmstar.parquet", [{**row, "index": n, "category": f"c{n}"} for n in (0, 1)])
    return ["D", "D: right"]


def mmmu(folder: Path) -> list[str]:
    image = {"bytes": png(), "path": "a.png"}
    base = {f"image_{n}": image if n == 1 else None for n in range(1, 8)}
    several = {"question": "See <image 1>. Which?", "options": "['3', '4']", "question_type": "multiple-choice"}
    open_one = {"question": "<image 1> How many?", "options": "[]", "question_type": "open", "answer": "12.5"}
    parquet(folder / "Art/validation-00000-of-00001.parquet", [{"id": "a", **several, "answer": "B", **base}])
    parquet(folder / "Math/validation-00000-of-00001.parquet", [{"id": "m", **open_one, **base}])
    return ["B", "It is 12.50 in all"]


def mathvista(folder: Path) -> list[str]:
    image = {"bytes": png(), "path": "a.png"}
    base = {"image": "images/1.jpg", "decoded_image": image, "unit": None, "metadata": {"task": "geometry"}}
    whole = {"choices": None, "precision": None, "question_type": "free_form", "answer_type": "integer", "answer": "12"}
    several = {"choices": ["up", "down"], "precision": None, "question_type": "multi_choice", "answer_type": "text"}
    asked = {"question": "How many?", "query": "Hint: a whole number.\nQuestion: How many?"}
    rows = [
        {"pid": "1", **asked, **base, **whole},
        {"pid": "2", **asked, **base, **several, "answer": "down"},
    ]
    parquet(folder / "data/testmini-00000-of-00001.parquet", rows)
    return ["There are 12.", "(B) down"]


def mm_vet(folder: Path) -> list[str]:
    row = {"imagename": "a.png", "question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]}
    dump(folder / "mm-vet.json", {"v1_0": row, "v1_1": {**row, "capability": ["rec"]}})
    picture(folder / "images/a.png")
    return ["-1 and -5", "both"]


def llava_bench(folder: Path) -> list[str]:
    asked = [
        {"image": "001.jpg", "text": "What is it?", "category": kind, "question_id": n} for n, kind in enumerate("ab")
    ]
    lines(folder / "questions.jsonl", asked)
    lines(folder / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": "An owl."}])
    lines(folder / "answers_gpt4.jsonl", [{"question_id": n, "text": "It is an owl."} for n in (0, 1)])
    picture(folder / "images/001.jpg")
    return ["An owl.", "A bird."]


def owleval(folder: Path) -> list[str]:
    rows = [
        {"image": "1.jpg", "question_id": 1, "question": "What is it?", "ability": "a,b", "category": ["single_turn"]},
        {
            "image": "2.jpg",
            "question_id": 2,
            "question": "And this?",
            "ability": "a,b",
            "category": ["single_turn", "multi_turn"],
        },
        {"image": "2.jpg", "question_id": 3, "question": "Why?", "ability": "a,e,f", "category": ["multi_turn"]},
    ]
    lines(folder / "questions.jsonl", rows)
    for name in ("1.jpg", "2.jpg"):
        picture(folder / "cases" / name, int(name[0]) * 60)
    return ["An owl.", "An oak.", "It has leaves."]


def q_bench(folder: Path) -> list[str]:
    row = {"img_path": "a.png", "question": "Is it sharp?", "candidates": ["Yes", "No"], "correct_ans": "No"}
    dump(folder / "llvisionqa_dev.json", [{**row, "type": n, "concern": n} for n in (0, 1)])
    picture(folder / "images/a.png")
    return ["B", "B. No"]


def mmlu(folder: Path) -> list[str]:
    rows = [[f"What is {n} and {n}?", 2 * n, 2 * n + 1, 2 * n + 2, 2 * n + 3, "A"] for n in range(6)]
    for subject in ("adding", "more_adding"):
        table(folder / f"dev/{subject}_dev.csv", rows)
        table(folder / f"test/{subject}_test.csv", rows[:1])
    return ["A", "A."]


def arc(folder: Path, kind: str) -> list[str]:
    letters = [{"text": text, "label": label} for text, label in (("owl", "A"), ("oak", "B"), ("ant", "C"))]
    numbers = [{"text": text, "label": label} for text, label in (("owl", "1"), ("oak", "2"))]
    rows = [
        {"id": "x", "question": {"stem": "Which is a tree?", "choices": letters}, "answerKey": "B"},
        {"id": "y", "question": {"stem": "Which is a bird?", "choices": numbers}, "answerKey": "1"},
    ]
    lines(folder / f"ARC-{kind}/ARC-{kind}-Test.jsonl", rows)
    return ["B", "A"]


def arc_challenge(folder: Path) -> list[str]:
    return arc(folder, "Challenge")


def arc_easy(folder: Path) -> list[str]:
    return arc(folder, "Easy")


def bbh(folder: Path) -> list[str]:
    for task in ("navigate", "sorting"):
        dump(folder / f"bbh/{task}.json", {"examples": [{"input": "Go left.", "target": "Yes"}]})
        (folder / "cot-prompts").mkdir(exist_ok=True)
        (folder / f"cot-prompts/{task}.txt").write_text("canary\n-----\nQ: Go.\nA: So the answer is No.")
    return ["Left. So the answer is Yes.", "the answer is Yes.\n\nQ: another? the answer is No."]


def agieval(folder: Path) -> list[str]:
    row = {"passage": None, "question": "1 + 1?", "options": ["(A)1", "(B)2"], "label": "B", "answer": None}
    lines(folder / "data/v1_1/sat-math.jsonl", [row])
    lines(folder / "data/v1_1/aqua-rat.jsonl", [row])
    return ["B", "(B)"]


def easy_vqa(folder: Path) -> list[str]:
    dump(folder / "test/questions.json", [["what shape is it?", "circle", 0], ["is it red?", "yes", 0]])
    picture(folder / "test/images/0.png")
    return ["circle", "Yes"]


def picture_world(folder: Path) -> list[str]:
    content = [{"type": "image"}, {"type": "text", "text": "what is it"}]
    row = {"messages": [{"role": "user", "content": content}], "pictures": ["a.png"], "answer": "circle , so yes"}
    lines(folder / "questions.jsonl", [{"id": str(n), "type": f"t{n}", **row} for n in (0, 1)])
    picture(folder / "a.png")
    return ["square , so yes", "yes"]


WRITERS = {
    write.__name__: write
    for write in (
        agieval,
        arc_challenge,
        arc_easy,
        bbh,
        chartqa,
        coco_caption,
        docvqa,
        easy_vqa,
        flickr30k,
        flickr8k,
        gqa,
        llava_bench,
        mathvista,
        mm_vet,
        mmbench,
        mme,
        mmlu,
        mmmu,
        mmstar,
        nocaps,
        okvqa,
        owleval,
        picture_world,
        pope,
        q_bench,
        scienceqa,
        seed_bench,
        textvqa,
        vizwiz,
        vqav2,
    )
} | {"textvqa_ocr": textvqa}
"""Benchmark → writes its files below a folder and returns the right answers, in the order of the questions."""
