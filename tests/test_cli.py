"""The verbs that need no Ray, as typed: convert, bench parity, doctor, chat."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from typing import NamedTuple

import psutil
import pytest
import torch
from conversations import ask, picture
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from jobs.cli import main
from jobs.doctor import memory
from owl_model import OwlAbstractorConfig, OwlConfig, OwlForConditionalGeneration, OwlProcessor, OwlVisionConfig
from owl_model.answering import answer, load, prompt_inputs, stream
from owl_model.config import PRESETS
from owl_model.memory import ATTENTION, Kept, predict_training
from pipelines.training.stages import Lora


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def owl_command(monkeypatch, capsys):
    """`owl …` in this process, which has torch loaded already."""

    def run(*arguments: object, words: str = "") -> Done:
        monkeypatch.setattr(sys, "argv", ["owl", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(words))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Done(ended.value.code or 0, *capsys.readouterr())

    return run


# --- convert ---------------------------------------------------------------------------------------------------------


def test_convert_there_and_back_is_bit_identical(owl_command, shared, tmp_path):
    theirs = shared / "golden" / "v2_one_image"
    for done in (
        owl_command("convert", theirs, "--out", tmp_path / "ours"),
        owl_command("convert", tmp_path / "ours", "--to", "official", "--out", tmp_path / "theirs"),
    ):
        assert done.returncode == 0, done.stderr
    again = load_file(tmp_path / "theirs" / "model.safetensors")
    for name, value in load_file(theirs / "model.safetensors").items():
        assert torch.equal(again[name], value), name


def test_an_official_folder_with_its_tokenizer_answers_like_its_conversion(owl_command, shared, tmp_path):
    theirs = tmp_path / "theirs"
    shutil.copytree(shared / "golden" / "v1_one_image", theirs)
    vocabulary = json.loads((theirs / "config.json").read_text())["text_config"]["vocab_size"]
    for path in (shared / "golden" / "preparation" / "tokenizer").iterdir():
        shutil.copy(path, theirs)
    done = owl_command("convert", theirs, "--out", tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    first, second = (OwlProcessor.from_pretrained(folder) for folder in (theirs, tmp_path / "ours"))
    assert first.template == second.template
    question = ask("image", " A chat  ?")
    assert first.encode(question, prompt=True) == second.encode(question, prompt=True)
    done = owl_command("convert", tmp_path / "ours", "--to", "official", "--out", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    # The authors' tokenizer opens this file and no other.
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (theirs / "tokenizer.model").read_bytes()
    if max(first.encode(question).ids) < vocabulary:  # the case's vocabulary is smaller than the tokenizer's
        assert answer(*load(str(theirs)), [question], [[picture("red")]])


def test_convert_begins_a_new_model_from_clip_and_a_language_model(owl_command, tmp_path, model_folder):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    CLIPVisionModel(CLIPVisionConfig(**shape, image_size=28, patch_size=14)).save_pretrained(tmp_path / "clip")
    settings = {"crop_size": 28, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(settings))
    language = f"{model_folder}/../language"
    towers = ["--vision", tmp_path / "clip", "--language-model", language]
    done = owl_command("convert", *towers, "--adaptive", "--out", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    config = OwlConfig.from_pretrained(tmp_path / "new")
    assert config.vision_config.model_type == "owl_vision"
    assert config.modality_adaptive
    done = owl_command("chat", tmp_path / "new", "-q", "circle ?")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["convert", "{model}", "--to", "official", "--out", "{out}"],
            "only a model that came from an official folder",
        ),
        (["convert", "{model}", "--to", "other", "--out", "{out}"], "--to is owl or official, not 'other'"),
        (["convert", "/nowhere", "--out", "{out}"], "no model folder at '/nowhere'"),
        (["convert", "--vision", "/nowhere", "--language-model", "/nowhere", "--out", "{out}"], "no model folder"),
        (["convert", "--out", "{out}"], "name either a model folder, or --vision and --language-model"),
        (["doctor", "--model", "owl3"], "'owl3' is neither a preset (tiny, owl1_7b, owl2_7b) nor a model folder"),
        (["doctor", "--model", "tiny", "--stage", "stage9"], "unknown stage 'stage9'"),
        (["doctor", "--model", "tiny", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["doctor", "--model", "tiny", "--length", "5"], "1 pictures take 9 tokens; the length is 5"),
        (["bench", "parity", "/nowhere"], "no case at /nowhere"),
        (["chat", "{model}", "--bits", "5", "-q", "?"], "5 bits: the language model can be read in 8 or 4"),
    ],
)
def test_what_the_user_can_mend_ends_in_one_sentence(owl_command, arguments, says, tmp_path, model_folder):
    done = owl_command(*[part.format(model=model_folder, out=tmp_path / "out") for part in arguments])
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


# --- bench parity ----------------------------------------------------------------------------------------------------


def test_parity_prints_a_line_a_case_and_fails_on_a_wrong_weight(owl_command, shared, tmp_path):
    right, wrong = shared / "golden" / "v1_one_image", tmp_path / "wrong"
    shutil.copytree(right, wrong)
    weights = load_file(wrong / "model.safetensors")
    name = next(name for name in weights if name.endswith("visual_fc.bias"))
    (wrong / "model.safetensors").chmod(0o644)
    save_file({**weights, name: weights[name] + 0.05}, wrong / "model.safetensors", metadata={"format": "pt"})
    done = owl_command("bench", "parity", right, wrong)
    assert done.returncode == 1
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first["case"] == "v1_one_image"
    assert first["passed"]
    assert first["greedy"]
    assert set(first["errors"]) >= {"vision", "abstractor", "logits", "loss", "gradients", "adamw"}
    assert not second["passed"]
    assert owl_command("bench", "parity", right).returncode == 0


# --- doctor ----------------------------------------------------------------------------------------------------------


def small() -> OwlConfig:
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    return OwlConfig(
        vision_config=OwlVisionConfig(**shape, image_size=112, patch_size=14),
        abstractor_config=OwlAbstractorConfig(**shape, encoder_hidden_size=192, num_queries=16),
        text_config=LlamaConfig(**shape, vocab_size=4000),
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_predicted_activations_are_those_that_autograd_keeps(checkpointing):
    batch, length = 8, 128
    with torch.device("meta"):
        ghost = OwlForConditionalGeneration._from_config(small(), attn_implementation=ATTENTION).train()
        if checkpointing:
            ghost.activation_checkpointing_enable()
        predicted = predict_training(ghost, ghost, batch=batch, length=length, pictures=1)
    owl = OwlForConditionalGeneration(small()).train()
    if checkpointing:
        owl.activation_checkpointing_enable()
    ids = torch.randint(3, 4000, (batch, length))
    ids[:, 4:21] = owl.config.image_token_id
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    labels = ids.masked_fill(ids == owl.config.image_token_id, -100)
    kept = Kept(owl)
    with kept:
        owl(input_ids=ids, attention_mask=mask, pixel_values=torch.randn(batch, 3, 112, 112), labels=labels)
    assert predicted["activations"] == pytest.approx(kept.bytes, rel=0.1)
    assert predicted["weights"] == pytest.approx(sum(p.numel() * 4 for p in owl.parameters()), rel=0.01)


def test_presets_have_the_released_numbers_of_parameters():
    for name, parameters in (("owl1_7b", 7_123_068_928), ("owl2_7b", 8_197_859_328)):
        settings = {"batch": 1, "length": 2048, "pictures": 1, "dtype": "bfloat16", "checkpointing": False}
        parts = memory(name, "inference", **settings, lora=Lora())
        assert parts["weights"] == pytest.approx(2 * parameters, rel=1e-3)
        assert parts["cache"] == 2 * 32 * 4096 * 2048 * 2
        frozen = memory(name, "stage2", **{**settings, "length": 512}, lora=Lora())
        assert frozen["gradients"] < 0.05 * frozen["weights"]


MEASURE = """
import sys, threading, time, psutil, torch
from test_cli import small
from owl_model import OwlForConditionalGeneration
torch.set_num_threads(1)
torch.randn(64, 64) @ torch.randn(64, 64)
me, peak, base = psutil.Process(), 0, psutil.Process().memory_info().rss
def watch():
    global peak
    while True:
        peak = max(peak, me.memory_info().rss)
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
owl = OwlForConditionalGeneration(small()).train()
optimizer = torch.optim.AdamW(owl.parameters())
ids = torch.randint(3, 4000, (64, 128))
ids[:, 4:21] = owl.config.image_token_id
labels = ids.masked_fill(ids == owl.config.image_token_id, -100)
for _ in range(2):
    owl(input_ids=ids, pixel_values=torch.randn(64, 3, 112, 112), labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
print(peak - base)
"""


@pytest.mark.slow
def test_predicted_memory_is_what_a_process_takes(tmp_path):
    with torch.device("meta"):
        ghost = OwlForConditionalGeneration._from_config(small(), attn_implementation=ATTENTION).train()
        predicted = predict_training(ghost, ghost, batch=64, length=128, pictures=1)["total"]
    freed_at_once = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
    paths = {"PYTHONPATH": "tests:."}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        capture_output=True,
        text=True,
        timeout=300,
        env={**psutil.Process().environ(), **freed_at_once, **paths},
    )
    assert int(done.stdout) == pytest.approx(predicted, rel=0.15), done.stderr


# --- chat ------------------------------------------------------------------------------------------------------------


def test_a_conversation_in_the_terminal(owl_command, model_folder, tmp_path, owl, processor):
    Image.new("RGB", (80, 80), "red").save(tmp_path / "red.png")
    words = f"/image {tmp_path}/nowhere.png\n/image {tmp_path}/red.png\ncircle ?\n\nwhat color ?\n/new\nyes ?\n"
    done = owl_command("chat", model_folder, words=words)
    assert done.returncode == 0, done.stderr
    assert "there is no picture at" in done.stdout.replace("\n", " ")
    assert done.stdout.count("owl ") >= 3
    data = (tmp_path / "red.png").read_bytes()
    first = answer(owl, processor, [ask("image", "circle ?")], [[data]], max_new_tokens=256)[0]
    assert "".join(first.split())[:40] in "".join(done.stdout.split())


def test_a_streamed_answer_is_the_answer(pair):
    owl, processor = pair
    talk, pictures = ask("image", "image", "circle ?"), [picture("red"), picture("blue")]
    whole = answer(owl, processor, [talk], [pictures], max_new_tokens=20)[0]
    pieces = list(stream(owl, processor, talk, pictures, max_new_tokens=20))
    assert "".join(pieces).strip() == whole
    assert len(pieces) > 1
    with pytest.raises(ValueError, match="shows 2 pictures, but 1 were given"):
        list(stream(owl, processor, talk, pictures[:1]))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_language_model_is_read_in_fewer_bits(tmp_path, processor, bits):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    owl = OwlForConditionalGeneration(PRESETS["tiny"]()).eval()  # its widths are multiples of a block of 4-bit numbers
    owl.save_pretrained(tmp_path)
    images = type(processor.image_processor)(56)
    OwlProcessor.for_model(owl.config, images, processor.tokenizer, "plain").save_pretrained(tmp_path)
    light, read = load(str(tmp_path), bits)
    assert light.get_memory_footprint() < owl.get_memory_footprint()
    names = {type(module).__name__ for module in light.model.language_model.modules()}
    assert {8: "Linear8bitLt", 4: "Linear4bit"}[bits] in names
    for part in (light.model.vision_model, light.model.abstractor):
        assert not {type(module).__name__ for module in part.modules()} & {"Linear8bitLt", "Linear4bit"}
    inputs = prompt_inputs(read, [ask("image", "circle ?")], [[picture("red")]])
    with torch.no_grad():
        exact, rough = owl(**inputs).logits.flatten(), light(**inputs).logits.flatten().float()
    assert torch.nn.functional.cosine_similarity(exact, rough, dim=0) > 0.95


def test_doctor_says_what_is_missing_and_what_to_change():
    command = [sys.executable, "-m", "jobs.cli", "doctor", "--recipe", "owl_stage1_tiny", "--data", "nowhere"]
    command += ["--memory", "0.01", "--rate", "0.05", "--json"]
    tight = subprocess.run(command, capture_output=True, text=True)
    assert tight.returncode == 1
    checks = {check["name"]: check for check in json.loads(tight.stdout)["checks"]}
    assert not checks["memory"]["good"]
    assert "micro_batch=8" in checks["memory"]["change"]
    assert "no curated dataset" in checks["data nowhere"]["found"]
    assert "parts.language_model names no folder" in checks["start"]["found"]


# --- bench tokens ----------------------------------------------------------------------------------------------------


def test_bench_tokens_times_the_engine(owl_command):
    """At a shape that this machine can hold; a GPU takes the papers'."""
    options = ("--preset", "tiny", "--precision", "fp32", "--clients", 2, "--words", 40, "--new", 4, "--repeats", 1)
    done = owl_command("bench", "tokens", *options)
    assert done.returncode == 0
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert told[0]["clients"] == 2
    assert told[0]["TPOT ms"]["p50"] > told[0]["bound ms"] > 0
    assert [row["with one picture"] for row in told if "with one picture" in row] == [
        "first asked about",
        "asked about again",
    ]
