"""`owl demo`: the whole way once, on pictures that the project draws itself.

A folder holds everything; each step leaves a mark there when it is done, so a killed demo goes on where it was.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from openai import OpenAI
from rich.console import Console
from rich.table import Table

from jobs.parts import assemble, write_tiny_language_model
from jobs.recipes import Recipe
from jobs.world.shards import PLANTED, World, total_samples, write_world
from pipelines import page, storage
from pipelines.curation.curate import curate
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.metrics import exact_match
from pipelines.evaluation.report import score_head, score_rows, score_table
from pipelines.progress import progress
from pipelines.serving import serve
from pipelines.serving.keys import new_key
from pipelines.settings import OwlError
from pipelines.training.stages import Stage
from pipelines.training.train import train

console = Console(stderr=True, highlight=False)


def run(folder: str, recipe: Recipe) -> dict:
    """Raw shards to answers, in ``folder``; returns what the summary page shows."""
    root = Path(folder).absolute()
    began = time.monotonic()
    refuse_other_recipe(root, recipe)
    seconds: dict[str, float] = {}

    with timed(seconds, "world", "1/7  Draw a picture world, with bad samples planted in it"):
        draw_world(root / "world", recipe.world)
    with timed(seconds, "curate", "2/7  Curate its raw shards with Ray Data"):
        manifests = {part: curate_part(root, part, recipe) for part in ("pairs", "instructions", "text")}
    check_ledger(manifests["pairs"], root)
    with timed(seconds, "language", "3/7  Train a small language model on the world's text alone"):
        parts = put_together(root, recipe)
        logs = {"language": train_stage(root, "language", recipe.language, parts, ["text"])}
    with timed(seconds, "stage1", "4/7  Stage 1: vision encoder and abstractor learn, the language model is frozen"):
        logs["stage1"] = train_stage(root, "stage1", recipe.stage1, f"{root}/runs/language/model", ["pairs"])
    with timed(seconds, "stage2", "5/7  Stage 2: abstractor and LoRA learn from instructions, vision is frozen"):
        logs["stage2"] = train_stage(root, "stage2", recipe.stage2, f"{root}/runs/stage1/model", ["instructions"])
    model = f"{root}/runs/stage2/model"
    with timed(seconds, "evaluate", "6/7  Evaluate on combinations that were held out, beside two controls"):
        results = evaluate(model, "picture_world", f"{root}/world/heldout", f"{root}/evaluation", recipe.evaluation)
    show_scores(results)
    with timed(seconds, "serve", "7/7  Serve the model and ask it through the openai client"):
        answers = ask_endpoint(root, model, recipe)
    summary = {
        "folder": str(root),
        "seconds": round(time.monotonic() - began, 1),
        "phases": seconds,
        "curation": {key: manifests["pairs"][key] for key in ("in", "kept", "dropped")},
        "parameters": {stage: log["parameters"] for stage, log in logs.items()},
        "scores": results["scores"],
        "answers": answers,
    }
    storage.write_json(f"{root}/summary.json", summary)
    write_summary_page(root, summary, logs)
    say_goodbye(root, summary)
    return summary


@contextmanager
def timed(seconds: dict[str, float], name: str, title: str) -> Iterator[None]:
    console.print(f"[bold]{title}[/bold]")
    began = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - began, 1)


def refuse_other_recipe(root: Path, recipe: Recipe) -> None:
    path = root / "recipe.json"
    now = recipe.model_dump_json(indent=1)
    if path.exists() and path.read_text() != now:
        raise OwlError(f"{root} holds a demo with other settings; choose another --dir, or remove it")
    root.mkdir(parents=True, exist_ok=True)
    path.write_text(now)


def draw_world(folder: Path, world: World) -> None:
    if (folder / "written.json").exists():
        return
    with progress("draw", total_samples(world), "samples") as counter:
        ray.get([write_part.remote(str(folder), world, part, counter) for part in PARTS])
    (folder / "planted.json").write_text(json.dumps(PLANTED, indent=1))
    (folder / "written.json").write_text(world.model_dump_json())


def curate_part(root: Path, part: str, recipe: Recipe) -> dict:
    settings = recipe.curation
    if part != "pairs":  # a conversation is not a copy because its picture looks like another's
        settings = settings.model_copy(update={"deduplication": None})
    return curate([f"{root}/world/raw/{part}"], f"{root}/curated/{part}", settings)


def check_ledger(manifest: dict, root: Path) -> None:
    """The books against what was planted, reason by reason."""
    planted = json.loads((root / "world/planted.json").read_text())
    table = Table("reason", "planted", "in the ledger", box=None)
    for reason in sorted({*planted, *manifest["dropped"]}):
        table.add_row(reason, str(planted.get(reason, 0)), str(manifest["dropped"].get(reason, 0)), style="dim")
    console.print(table)
    if planted != manifest["dropped"]:
        raise OwlError(f"the ledger counts {manifest['dropped']}, but planted was {planted}")
    console.print(f"  {manifest['in']:,} in = {manifest['kept']:,} kept + {sum(planted.values())} dropped, as planted")


def put_together(root: Path, recipe: Recipe) -> str:
    """The untrained language model with a tokenizer of its own, and the Owl around it."""
    language, owl = f"{root}/runs/parts/language", f"{root}/runs/parts/owl"
    if not storage.exists(f"{owl}/finished"):
        write_tiny_language_model(spoken(f"{root}/curated/text"), language)
        assemble(recipe.parts.model_copy(update={"language_model": language}), owl)
    return owl


def spoken(dataset: str) -> Iterator[str]:
    """All text of a curated conversation set."""
    for path in storage.listing(f"{dataset}/shards", ".arrow"):
        for messages in storage.open_arrow(path).read_all()["messages"].to_pylist():
            yield from (part["text"] for message in messages for part in message["content"] if part["text"])


def train_stage(root: Path, stage: str, settings: Stage, start: str, parts: list[str]) -> dict:
    data = [f"{root}/curated/{part}" for part in parts]
    log = train(stage, settings.model_copy(update={"start": start, "data": data}), f"{root}/runs/{stage}")
    for name, count in log["parameters"].items():
        console.print(f"  [dim]{name:<11}{count['trainable']:>9,} of {count['total']:>9,} parameters train[/dim]")
    return log


def show_scores(results: dict) -> None:
    table = Table(*score_head(results["scores"]), box=None)
    for row in score_rows(results["scores"]):
        table.add_row(*row)
    console.print(table)


def ask_endpoint(root: Path, model: str, recipe: Recipe) -> list[dict]:
    """Serves the model and asks one held-out question of each type that shows a picture, each about another one."""
    rows = [json.loads(line) for line in (root / "world/heldout/questions.jsonl").read_text().splitlines()]
    one_of_each: dict[str, dict] = {}
    for row in rows:
        seen = [path for other in one_of_each.values() for path in other["pictures"]]
        if row["pictures"] and row["type"] not in one_of_each and not {*row["pictures"]} & {*seen}:
            one_of_each[row["type"]] = row
    secret, made = new_key("demo")
    with serve.running(model, recipe.serving, made) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key=secret)
        return [ask(client, root, recipe.serving.name, row) for row in one_of_each.values()]


def ask(client: OpenAI, root: Path, model: str, row: dict) -> dict:
    pictures = [root / "world/heldout" / name for name in row["pictures"]]
    messages = with_pictures(row["messages"], pictures)
    pieces = client.chat.completions.create(model=model, messages=messages, max_tokens=32, temperature=0, stream=True)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices).strip()
    question = " … ".join(m["content"][-1]["text"] for m in row["messages"] if m["role"] == "user")
    right = bool(exact_match(text, row["answer"]))
    mark = "[green]✓[/green]" if right else "[red]✗[/red]"
    shown = " ".join(os.path.relpath(path) for path in pictures)
    console.print(f"  {mark} {shown}  {question}  [bold]{text}[/bold]", soft_wrap=True)
    return {"pictures": [str(path) for path in pictures], "question": question, "answer": text, "right": right}


def with_pictures(messages: list[dict], pictures: list[Path]) -> list[dict]:
    """Bare image parts → data: URIs, as OpenAI's clients send them."""
    coming = iter(pictures)

    def part(item: dict) -> dict:
        if item["type"] != "image":
            return item
        data = base64.b64encode(next(coming).read_bytes()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}

    return [
        {**m, "content": m["content"] if isinstance(m["content"], str) else [part(item) for item in m["content"]]}
        for m in messages
    ]


def write_summary_page(root: Path, summary: dict, logs: dict[str, dict]) -> None:
    curation, scores = summary["curation"], summary["scores"]
    losses = {stage: [(h["step"], h["loss"]) for h in log["history"]] for stage, log in logs.items()}
    shown = [
        page.figure(
            [Path(path).read_bytes() for path in a["pictures"]],
            page.Markup('{}<br><span class="{}">{}</span>').format(
                a["question"], "right" if a["right"] else "wrong", a["answer"]
            ),
        )
        for a in summary["answers"]
    ]
    trained = [
        (stage, name, f"{count['trainable']:,}", f"{count['total']:,}")
        for stage, table in summary["parameters"].items()
        for name, count in table.items()
    ]
    dropped = sorted(curation["dropped"].items(), key=lambda item: -item[1])
    overall = {
        "samples in": f"{curation['in']:,}",
        "kept": f"{curation['kept']:,}",
        "held-out accuracy": f"{scores['picture']['all']['accuracy']:.1%}",
        "seconds, all": f"{summary['seconds']:.0f}",
    }
    html = page.page(
        "Owl, the whole way once",
        "raw shards → curated Arrow → two stages of training → held-out questions → an endpoint",
        page.section("At a glance", page.numbers(overall)),
        page.section("Pictures with the endpoint's answers", page.pictures(shown)),
        page.section("Held-out questions", score_table(scores)),
        page.section("Loss", page.lines(losses, "step", "loss per token")),
        page.section("What trained", page.table(("stage", "module", "trainable", "parameters"), trained, numeric=2)),
        page.section(
            "Dropped from the pairs",
            page.bars([(reason, number, str(number)) for reason, number in dropped]),
            page.Markup('<p><a href="curated/pairs/report.html">The curation report</a> shows each of them, ')
            + page.Markup('<a href="evaluation/report.html">the evaluation report</a> more answers.</p>'),
        ),
        page.section("Seconds, by phase", page.bars([(k, v, f"{v:.0f} s") for k, v in summary["phases"].items()])),
        page.section("Go on", page.code(next_commands(root))),
    )
    storage.write_text(f"{root}/report.html", html)


def next_commands(root: Path) -> str:
    here = os.path.relpath(root)
    return "\n".join(
        [
            f"owl chat {here}/runs/stage2/model --image {here}/world/heldout/pictures/0000.png",
            f"owl serve {here}/runs/stage2/model",
            "owl curate RAW_SHARDS --out DATASET",
        ]
    )


def say_goodbye(root: Path, summary: dict) -> None:
    accuracy = summary["scores"]["picture"]["all"]["accuracy"]
    console.print(f"\n[bold]{accuracy:.1%}[/bold] of the held-out questions; this run took {summary['seconds']:.0f} s")
    console.print(f"Look:   {os.path.relpath(root)}/report.html\nGo on:")
    for line in next_commands(root).splitlines():
        console.print(f"  {line}", soft_wrap=True)


PARTS = ("pairs", "instructions", "text", "heldout")


@ray.remote
def write_part(folder: str, world: World, part: str, counter) -> None:
    write_world(Path(folder), world, part, tick=lambda number: counter.advance.remote(number))
