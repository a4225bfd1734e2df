"""A run from questions to results: controls, resume after a kill, failures, likelihood, grades, comparison, books."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from official import WRITERS, png, table
from PIL import Image
from s3_server import s3_server
from transformers import CLIPModel, CLIPProcessor, LlamaForCausalLM

from jobs.parts import assemble
from jobs.recipes import Parts
from owl_model.answering import choice_log_likelihoods, load
from pipelines.evaluation.benchmarks import BENCHMARKS, picture_world
from pipelines.evaluation.evaluate import Evaluation, evaluate, evaluate_several, fingerprint, read_questions
from pipelines.evaluation.plan import shown
from pipelines.evaluation.results import compare
from pipelines.settings import OwlError

QUICK = Evaluation(batch_size=16, max_new_tokens=4)


def test_controls_show_another_picture_or_none(world):
    questions = picture_world.BENCHMARK.read(f"{world}/heldout")
    asked = {q.id: q for q in questions}
    other, none = shown(questions, "wrong picture"), shown(questions, "no picture")
    assert {item["id"] for item in other} == {item["id"] for item in none} == {q.id for q in questions if q.pictures}
    for item in other:
        assert item["pictures"] != list(asked[item["id"]].pictures)
        assert len(item["pictures"]) == len(asked[item["id"]].pictures)
    for item in none:
        assert item["pictures"] == []
        assert not any(p["type"] == "image" for m in item["messages"] for p in m["content"] if isinstance(p, dict))


@pytest.fixture(scope="module")
def finished(cluster, world, model_folder, tmp_path_factory) -> Path:
    """One evaluation with controls, by one actor."""
    out = tmp_path_factory.mktemp("finished")
    settings = QUICK.model_copy(update={"controls": True})
    evaluate(model_folder, "picture_world", f"{world}/heldout", str(out), settings)
    return out


@pytest.mark.slow
def test_one_actor_and_two_write_the_same_results(finished, world, model_folder, tmp_path):
    settings = QUICK.model_copy(update={"actors": 2, "controls": True, "cpus_per_actor": 0.5})
    evaluate(model_folder, "picture_world", f"{world}/heldout", str(tmp_path), settings)
    for name in ("results.json", "answers.parquet"):
        assert (finished / name).read_bytes() == (tmp_path / name).read_bytes()
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["questions"] == len(read_questions(BENCHMARKS["picture_world"], f"{world}/heldout"))
    assert found["failed"] == 0
    assert set(found["scores"]) == {"picture", "wrong picture", "no picture"}
    assert (tmp_path / "report.html").read_text().count("<figure>") > 3
    assert json.loads((tmp_path / "run.json").read_text())["answers_per_second"] > 0


@pytest.mark.slow
def test_killed_in_the_middle_nothing_is_asked_twice(cluster, world, model_folder, tmp_path):
    """kill -9 of the whole process group, Ray included; what was answered stays as it is to the nanosecond."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    settings = Evaluation(batch_size=2, max_new_tokens=4)
    options = ["--benchmark", "picture_world", "--data", f"{world}/heldout", "--set", "batch_size=2"]
    command = [sys.executable, "-m", "jobs.cli", "eval", model_folder, *options, "--set", "max_new_tokens=4"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    driver = subprocess.Popen([*command, "--out", str(killed)], start_new_session=True, **quiet)
    answers = killed / "answers"
    deadline = time.time() + 120
    while not answers.exists() or len(list(answers.glob("picture*.parquet"))) < 3:
        assert time.time() < deadline
        assert driver.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(1)  # Ray's own processes notice that their driver is gone
    before = {path.name: path.stat().st_mtime_ns for path in answers.glob("picture*.parquet")}
    whole = len(picture_world.BENCHMARK.read(f"{world}/heldout")) / 2
    assert 3 <= len(before) < whole
    for out in (killed, alone):
        evaluate(model_folder, "picture_world", f"{world}/heldout", str(out), settings)
    assert {name: (answers / name).stat().st_mtime_ns for name in before} == before
    for name in ("results.json", "answers.parquet"):
        assert (killed / name).read_bytes() == (alone / name).read_bytes()


def test_a_failure_is_a_row_with_its_error(cluster, model_folder, tmp_path):
    WRITERS["picture_world"](tmp_path / "data")
    lines = (tmp_path / "data/questions.jsonl").read_text().splitlines()
    broken = {**json.loads(lines[0]), "id": "broken", "pictures": ["broken.png"]}
    (tmp_path / "data/broken.png").write_bytes(b"no picture")
    (tmp_path / "data/questions.jsonl").write_text("\n".join([lines[0], json.dumps(broken), lines[1]]))
    found = evaluate(model_folder, "picture_world", f"{tmp_path}/data", f"{tmp_path}/out", QUICK)
    rows = {row["id"]: row for row in pq.read_table(tmp_path / "out/answers.parquet").to_pylist()}
    assert found["failed"] == 1
    assert rows["broken"]["score"] == 0.0
    assert "ImageError" in rows["broken"]["error"]
    assert [rows[id]["error"] for id in ("0", "1")] == [None, None]
    assert "ImageError" in (tmp_path / "out/report.html").read_text()


def test_every_answer_can_be_traced(cluster, model_folder, tmp_path):
    WRITERS["mmbench"](tmp_path / "data")
    found = evaluate(model_folder, "mmbench", f"{tmp_path}/data", f"{tmp_path}/out", QUICK)
    for row in pq.read_table(tmp_path / "out/answers.parquet").to_pylist():
        assert row["benchmark"] == "mmbench/1 circular accuracy"
        assert row["model_sha256"] == found["model_sha256"]
        assert row["split_sha256"] == found["split_sha256"]
        assert json.loads(row["decoding"]) == {"max_new_tokens": 4, "min_new_tokens": 0, "do_sample": False}
        assert row["prompt"].startswith("<image> ")
        assert Path(row["pictures"][0]).exists()
    shutil.rmtree(tmp_path / "data")  # the file held the pictures, too
    assert len(list((tmp_path / "out/pictures").iterdir())) == 1
    assert "data:image/webp" in (tmp_path / "out/report.html").read_text()
    WRITERS["mmbench"](tmp_path / "data")
    with pytest.raises(OwlError, match="holds another evaluation"):
        evaluate(model_folder, "mmbench", f"{tmp_path}/data", f"{tmp_path}/out", Evaluation())


def test_unknown_benchmark_and_missing_files_are_named(model_folder, tmp_path):
    with pytest.raises(OwlError, match="unknown benchmark 'texvqa'; did you mean 'textvqa'"):
        evaluate(model_folder, "texvqa", "x", f"{tmp_path}/out", Evaluation())
    with pytest.raises(OwlError, match=r"no .*questions\.jsonl: picture_world reads"):
        evaluate(model_folder, "picture_world", str(tmp_path), f"{tmp_path}/out", Evaluation())
    WRITERS["vqav2"](tmp_path)
    with pytest.raises(OwlError, match="answers=likelihood needs choices, and 2 questions have none"):
        evaluate(model_folder, "vqav2", str(tmp_path), f"{tmp_path}/out", Evaluation(answers="likelihood"))


@pytest.fixture(scope="module")
def real_model(shared, tmp_path_factory) -> str:
    """MobileNetV2 and a LLaMA of 260,000 parameters, both pretrained, with a fresh abstractor between them."""
    folder = tmp_path_factory.mktemp("real")
    weights = shared / "data/weights"
    parts = Parts(
        vision=f"{weights}/mobilenet-v2-imagenet",
        language_model=f"{weights}/tinystories-llama/stories260K",
        abstractor={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
        template="plain",
    )
    assemble(parts, f"{folder}/owl")
    return f"{folder}/owl"


def write_choices(folder: Path, count: int) -> None:
    """MMLU and MMBench in their official layouts, with as many questions each, counted with MMBench's orders."""
    words = ["cat", "dog", "tree", "house", "ball", "sun", "moon", "bird", "fish", "girl", "boy", "park"]
    asked = [f"What did the {words[n % 12]} see near the {words[(n * 5 + 1) % 12]}?" for n in range(count)]
    rows = [[text, *(words[(n + k) % 12] for k in range(4)), "A"] for n, text in enumerate(asked)]
    table(folder / "mmlu/dev/stories_dev.csv", rows[:1])
    table(folder / "mmlu/test/stories_test.csv", rows)
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    pictures = [base64.b64encode(png(40 * n)).decode() for n in range(count // 4)]
    table(
        folder / "mmbench/mmbench_dev_20230712.tsv",
        [head, *([n, row[0], "", *row[1:5], "B", "stories", pictures[n]] for n, row in enumerate(rows[: count // 4]))],
        "\t",
    )


@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_likelihoods_are_transformers_own(count, cluster, shared, real_model, tmp_path):
    """Two times ``count`` questions, MMLU's and MMBench's, through LlamaForCausalLM itself, which is given the
    pictures' embeddings."""
    write_choices(tmp_path, count)
    llama = LlamaForCausalLM.from_pretrained(shared / "data/weights/tinystories-llama/stories260K").eval()
    owl, processor = load(real_model)
    settings = Evaluation(answers="likelihood", batch_size=16)
    asked = 0
    for name in ("mmlu", "mmbench"):
        evaluate(real_model, name, f"{tmp_path}/{name}", f"{tmp_path}/out-{name}", settings)
        rows = {row["id"]: row for row in pq.read_table(tmp_path / f"out-{name}/answers.parquet").to_pylist()}
        for question in read_questions(BENCHMARKS[name], f"{tmp_path}/{name}"):
            prompt = processor.encode(question.messages, prompt=True).ids
            ends = processor.tokenizer(list(question.choices), add_special_tokens=False)["input_ids"]
            expected = [reference(llama, owl, processor, prompt, end, question.pictures) for end in ends]
            assert rows[question.id]["log_likelihoods"] == pytest.approx(expected, abs=2e-4)
            assert rows[question.id]["answer"] == question.choices[int(np.argmax(expected))]
            asked += 1
    assert asked == 2 * count


@torch.no_grad()
def reference(llama, owl, processor, prompt: list[int], end: list[int], pictures: list[bytes]) -> float:
    """log p(end | prompt) by one plain pass of transformers' LLaMA, nothing padded, nothing shared."""
    ids = torch.tensor([prompt + end])
    places = ids[0] == processor.image_token_id
    embedded = llama.get_input_embeddings()(ids.masked_fill(places, 0))
    for data in pictures:
        pixels = processor.image_processor.pixels(data)[None]
        embedded[0, places] = owl.get_image_features(pixels).pooler_output.reshape(-1, embedded.shape[-1])
    values = llama(inputs_embeds=embedded).logits[0].double().log_softmax(-1)
    return float(sum(values[len(prompt) - 1 + place, token] for place, token in enumerate(end)))


def test_choices_of_several_tokens_are_summed(owl, processor):
    messages = [{"role": "user", "content": "what color is the circle ?"}]
    found = choice_log_likelihoods(owl, processor, [messages, messages], [[], []], [["red", "red large"], ["blue"]])
    for choice, value in (("red", found[0][0]), ("red large", found[0][1]), ("blue", found[1][0])):
        whole = processor.encode([*messages, {"role": "assistant", "content": choice}])
        start = len(processor.encode(messages, prompt=True).ids)
        with torch.no_grad():
            logits = owl(input_ids=torch.tensor([whole.ids])).logits[0].double().log_softmax(-1)
        end = whole.ids[start:-1]
        expected = sum(float(logits[start - 1 + place, token]) for place, token in enumerate(end))
        assert value == pytest.approx(expected, abs=1e-4)


def test_two_models_are_compared_question_by_question(finished, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    found, pairs = compare(str(finished), str(other))
    assert (found["difference"], found["low"], found["high"]) == (0.0, 0.0, 0.0)
    assert (found["only_first_better"], found["only_second_better"], pairs) == (0, 0, [])
    rows = pq.read_table(other / "answers.parquet")
    scores = [1.0 if number % 2 else 0.0 for number in range(len(rows))]
    graded = rows.set_column(rows.schema.get_field_index("score"), "score", [scores])
    pq.write_table(graded, other / "answers.parquet")
    found, pairs = compare(str(finished), str(other))
    assert found["low"] < found["difference"] < found["high"]
    assert found["difference"] == pytest.approx(0.5, abs=0.1)
    assert len(pairs) == found["only_second_better"] + found["only_first_better"] > 0
    results = json.loads((other / "results.json").read_text())
    (other / "results.json").write_text(json.dumps({**results, "split_sha256": "another"}))
    with pytest.raises(OwlError, match="differ in split_sha256"):
        compare(str(finished), str(other))


def test_what_no_rule_can_score_waits_for_grades(cluster, model_folder, tmp_path):
    WRITERS["owleval"](tmp_path / "data")
    found = evaluate(model_folder, "owleval", f"{tmp_path}/data", f"{tmp_path}/out", QUICK)
    assert (found["questions"], found["graded"], found["headline"], found["metrics"]) == (3, 0, None, {})
    rows = pq.read_table(tmp_path / "out/answers.parquet").to_pylist()
    assert [row["score"] for row in rows] == [None, None, None]
    assert rows[2]["prompt"].startswith("user: <image> And this?\nassistant:")
    assert len(rows[2]["pictures"]) == 1


@pytest.mark.slow
def test_captions_get_the_clipscore_of_a_given_clip(cluster, model_folder, scorers, tmp_path):
    """Held to transformers' CLIPModel on one caption at a time (Hessel et al. 2021, equations 1 and 2)."""
    WRITERS["coco_caption"](tmp_path / "data")
    settings = QUICK.model_copy(update={"clip": scorers["clip"]})
    found = evaluate(model_folder, "coco_caption", f"{tmp_path}/data", f"{tmp_path}/out", settings)
    model, processor = CLIPModel.from_pretrained(scorers["clip"]), CLIPProcessor.from_pretrained(scorers["clip"])
    expected, with_references = [], []
    for row in pq.read_table(tmp_path / "out/answers.parquet").to_pylist():
        texts = [f"A photo depicts {text}" for text in (row["answer"], *json.loads(row["facts"])["references"])]
        image = Image.open(row["pictures"][0]).convert("RGB")
        with torch.no_grad():
            out = model(**processor(text=texts, images=image, return_tensors="pt", padding=True))
        score = 2.5 * max(0.0, float(out.text_embeds[0] @ out.image_embeds[0]))
        best = max(0.0, float((out.text_embeds[1:] @ out.text_embeds[0]).max()))
        expected.append(score)
        with_references.append(2 * score * best / max(score + best, 1e-12))
    assert found["metrics"]["CLIPScore"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert found["metrics"]["RefCLIPScore"] == pytest.approx(np.mean(with_references), abs=1e-4)
    assert found["metrics"]["tokenizer"] == "PTB"
    with pytest.raises(OwlError, match="no CLIP folder at"):
        evaluate(
            model_folder, "coco_caption", f"{tmp_path}/data", f"{tmp_path}/no", QUICK.model_copy(update={"clip": "x"})
        )


@pytest.mark.slow
def test_several_benchmarks_end_in_a_table_like_the_papers(cluster, model_folder, tmp_path):
    for name in ("gqa", "vqav2"):
        WRITERS[name](tmp_path / "data" / name)
    (tmp_path / "data/notes").mkdir()
    found = evaluate_several(model_folder, "all", f"{tmp_path}/data", f"{tmp_path}/out", QUICK)
    assert found["head"] == ["", "gqa", "vqav2"]
    rows = {row[0]: row[1:] for row in found["rows"]}
    assert rows["mPLUG-Owl2"] == ["56.1", "79.4"]
    assert rows["BLIP-2"] == ["–", "65"]
    assert rows["owl"] == ["0", "0"]
    assert 'href="gqa/report.html"' in (tmp_path / "out/table.html").read_text()
    with pytest.raises(OwlError, match="no folder in"):
        evaluate_several(model_folder, "all", f"{tmp_path}/out/none", f"{tmp_path}/out", QUICK)


@pytest.mark.slow
def test_model_data_and_results_may_be_in_a_bucket(model_folder, tmp_path, monkeypatch):
    """A real S3 server; the run is a process of its own, so that Ray's workers know of it."""
    with s3_server(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        bucket = fsspec.filesystem("s3")
        bucket.mkdir("owl")
        WRITERS["mmbench"](tmp_path / "mmbench")
        for here, there in ((model_folder, "model"), (f"{tmp_path}/mmbench", "mmbench")):
            bucket.put(f"{here}/", f"owl/{there}/", recursive=True)
        options = ["--benchmark", "mmbench", "--data", "s3://owl/mmbench", "--out", "s3://owl/out", "--json"]
        command = [sys.executable, "-m", "jobs.cli", "eval", "s3://owl/model", *options, "--set", "max_new_tokens=4"]
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["questions"] == 5
        assert json.loads(done.stdout)["model_sha256"] == fingerprint(model_folder)
        assert bucket.exists("owl/out/report.html")
        assert len(bucket.ls("owl/out/pictures")) == 1
