"""The house: imports in one direction, the README true, recipes sound, the world as it says, errors in one sentence."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs import papers, recipes
from jobs.cli import app
from jobs.doctor import examine
from jobs.recipes import RECIPES, load
from jobs.world.scenes import HELD_OUT
from jobs.world.shards import World, instructions, pairs, texts
from pipelines.settings import SettingError, Settings

ROOT = Path(__file__).parents[1]
LEVEL = {"owl_model": 0, "pipelines": 1, "jobs": 2}
SOURCES = [path for top in LEVEL for path in (ROOT / top).rglob("*.py")]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    top = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        assert LEVEL.get(name, -1) <= LEVEL[top], f"{path} imports {name}"
        assert not (top == "owl_model" and name == "ray")


def test_every_path_in_the_readme_exists():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"`([a-z_]+/[a-z_/]+\.py)`", text):
        assert (ROOT / path).is_file(), path


GROUPS = ("curate", "bench", "eval")


def test_every_command_in_the_readme_is_one_that_owl_has():
    for line in re.findall(r"^\$ owl (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE):
        verb, *rest = line.split()
        below = [rest[0] if rest and rest[0].isalpha() else "run"] if verb in GROUPS else []
        text = CliRunner().invoke(app, [verb, *below, "--help"], env={"COLUMNS": "200"}).output
        for option in re.findall(r"--[a-z]+", line):
            assert option in text, f"owl {verb} has no {option}"


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_load_and_say_what_they_are(name):
    recipe = load(name)
    assert recipe.about.startswith("owl ")
    assert recipe.about.count(" · ") >= 3


def test_the_papers_recipes_follow_the_papers():
    """arXiv 2304.14178, section 4.1, and 2311.04257, section 4.1; in figures written down a second time."""
    published = {
        "owl_stage1": ("stage1", 50_000, 8192, 1e-4, 2000, 0.1, 1.0, 0),
        "owl_stage2": ("stage2", 2000, 256, 2e-5, 50, 1e-4, 1.0, 0),
        "owl2_stage1": ("owl2_stage1", 42_500, 8192, 1e-4, 1000, 0.05, 0.9, 0),
        "owl2_stage2": ("owl2_stage2", 4800, 256, 2e-5, 144, 0.0, 1.0, 448),
    }
    for name, (stage, steps, batch, peak, warmup, decay, layers, side) in published.items():
        recipe = load(name)
        settings = getattr(recipe, stage.removeprefix("owl2_"))
        found = settings.optimization
        assert (recipe.train, settings.steps, settings.batch_size) == (stage, steps, batch)
        assert (found.learning_rate, found.warmup, found.weight_decay) == (peak, warmup, decay)
        assert (found.layer_decay, settings.image_size, found.betas) == (layers, side, (0.9, 0.98))


@pytest.mark.parametrize("name", [f"{name}{size}" for name in papers.PAPERS for size in ("", "_1b")])
def test_the_papers_recipes_need_what_they_say(name):
    found = examine(load(name), "", [], "", "s3://nowhere", gigabytes=80, teraflops=990)
    said = int(re.search(r"(\d+) GB", load(name).about)[1])
    assert said == pytest.approx(found["memory"]["total"] / 1e9, abs=1)
    time = re.search(r"([\d.]+) (day|hour|minute)s ·", load(name).about)
    days = float(time[1]) / {"day": 1, "hour": 24, "minute": 1440}[time[2]]
    assert days == pytest.approx(found["days"], rel=0.15)


def test_every_setting_has_a_help_text():
    def check(kind: type[Settings]) -> None:
        for name, field in kind.model_fields.items():
            assert field.description, f"{kind.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
                check(field.annotation)

    check(recipes.Recipe)


def test_an_unknown_recipe_is_refused_with_the_nearest():
    with pytest.raises(SettingError, match="unknown recipe 'dmeo'; did you mean 'demo'"):
        load("dmeo")


def test_held_out_combinations_appear_nowhere_in_training():
    small = World(pairs=400, instructions=200, texts=400)
    spoken = []
    for sample in (*pairs(small), *instructions(small), *texts(small)):
        fields = json.loads(dict(sample)["json"])
        spoken += fields.get("captions") or [json.dumps(fields["messages"])]
    text = " ".join(spoken)
    for size, colour, kind in HELD_OUT:
        assert f"{kind} {size} {colour}" not in text
    assert "circle large red" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["curate", "/nowhere/*.tar", "--out", "OUT"], "no raw shards at '/nowhere/*.tar'"),
        (["curate", "x.tar", "--out", "OUT", "--set", "limits.min_word=3"], "did you mean 'min_words'"),
        (["curate", "x.tar", "--out", "OUT", "--recipe", "real_smal"], "did you mean 'real_small'"),
        (["train", "stage9", "--data", "x", "--run", "OUT"], "unknown stage 'stage9'"),
        pytest.param(
            ["train", "stage1", "--data", "/nowhere", "--run", "OUT", "--start", "/nowhere"],
            "no curated dataset at /nowhere",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["eval", "/nowhere", "--benchmark", "picture_world", "--data", "x", "--out", "OUT"],
            "no model folder at",
            marks=pytest.mark.slow,
        ),
        (["serve", "/nowhere"], "no model folder at '/nowhere'"),
        (["chat", "/nowhere"], "no model folder at '/nowhere'"),
        (["chat"], "name either a model folder or --url"),
    ],
)
def test_what_the_user_can_mend_ends_in_one_sentence(arguments, says, tmp_path):
    arguments = [argument.replace("OUT", str(tmp_path / "out")) for argument in arguments]
    done = subprocess.run([sys.executable, "-m", "jobs.cli", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert says in done.stderr
    assert "Traceback" not in done.stderr
