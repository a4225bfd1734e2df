"""`owl bench`: what anyone can measure for themselves. One JSON line for each thing measured, on standard output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from jobs.options import Overrides, RecipeName, recipe_of
from pipelines.settings import OwlError

app = typer.Typer(help="Checks and measurements that anyone can repeat.", no_args_is_help=True)


@app.callback()
def measure() -> None:
    """Checks and measurements that anyone can repeat."""


@app.command()
def parity(
    folders: Annotated[
        list[Path], typer.Argument(help="Case folders: config.json, weights, io.safetensors, meta.json.")
    ],
) -> None:
    """Compares the model with the authors' outputs, case by case: the largest error of each output, the errors of
    loss, gradient norms and AdamW losses, and whether the greedy tokens agree. Status 1 if any tolerance is missed."""
    from owl_model.parity import check

    for folder in folders:
        if not (folder / "io.safetensors").exists():
            raise OwlError(f"no case at {folder}: it has no io.safetensors")
    missed = False
    for folder in folders:
        result = check(folder)
        missed |= not result["passed"]
        print(json.dumps(result), flush=True)
    if missed:
        raise typer.Exit(1)


@app.command()
def model(
    repeats: Annotated[int, typer.Option("--repeats", help="Turns of each; the median counts.")] = 5,
    threads: Annotated[int, typer.Option("--threads", help="CPU threads.")] = 2,
) -> None:
    """Training step and greedy decoding beside the plain composition of transformers' CLIP, Q-Former and LLaMA."""
    import torch

    from jobs.bench_model import measure

    torch.set_num_threads(threads)
    for result in measure(repeats):
        print(json.dumps(result), flush=True)


@app.command()
def curation(
    folder: Annotated[Path, typer.Option("--dir", help="Folder for the raw shards that are made, and for results.")],
    ways: Annotated[
        list[str] | None,
        typer.Option("--way", help="One of the ways to measure; without it, all (needs webdataset and make rivals)."),
    ] = None,
    sizes: Annotated[tuple[int, int], typer.Option("--sizes", help="Pictures of the two inputs.")] = (2000, 8000),
    repeats: Annotated[int, typer.Option("--repeats", help="Turns of each; the median counts.")] = 5,
) -> None:
    """CPU, time and memory of curation beside a bare loop of the same decoding, and beside Ray Data, webdataset,
    img2dataset, Daft and Data-Juicer."""
    from jobs.bench_curation import WAYS, measure

    if unknown := set(ways or []) - set(WAYS):
        raise OwlError(f"unknown way {', '.join(sorted(unknown))}; known: {', '.join(WAYS)}")
    for result in measure(str(folder), ways or list(WAYS), sizes, repeats):
        print(json.dumps(result), flush=True)


@app.command()
def duplicates(
    raw: Annotated[list[str] | None, typer.Argument(help="Raw shards of pictures to make copies of.")] = None,
    pictures: Annotated[int, typer.Option("--pictures", help="How many pictures are copied.")] = 400,
    rows: Annotated[list[int] | None, typer.Option("--rows", help="Find duplicates in so many made-up rows.")] = None,
    folder: Annotated[Path, typer.Option("--dir", help="Folder for the made-up ledgers.")] = Path("duplicates"),
) -> None:
    """The share of changed copies that is found, beside imagehash; and the time for ledgers of millions of rows."""
    from jobs.bench_duplicates import find_copies, take_time
    from jobs.session import ray_session

    for result in find_copies(raw, pictures) if raw else ():
        print(json.dumps(result), flush=True)
    if rows:
        with ray_session():
            for number in rows:
                print(json.dumps(take_time(f"{folder}/{number}", number)), flush=True)


@app.command()
def shards(
    folder: Annotated[Path, typer.Option("--dir", help="Folder for the raw shards that are made, and for results.")],
    counts: Annotated[list[int], typer.Option("--shards", help="How many shards. Repeatable.")],
) -> None:
    """CPU, time and memory of curation over many tiny shards of two pictures."""
    from jobs.bench_curation import measure_shards

    for result in measure_shards(str(folder), counts):
        print(json.dumps(result), flush=True)


@app.command()
def captions(
    raw: Annotated[list[str], typer.Argument(help="Raw shards with captions.")],
    count: Annotated[int, typer.Option("--count", help="How many captions.")] = 5000,
    repeats: Annotated[int, typer.Option("--repeats", help="Passes of each; the median counts.")] = 5,
) -> None:
    """Microseconds a caption that statistics, rules, language, masking and deduplication take."""
    from jobs.bench_curation import measure_captions

    print(json.dumps(measure_captions(raw, count, repeats)), flush=True)


@app.command()
def feed(
    folder: Annotated[Path, typer.Option("--dir", help="Folder for the datasets that are made.")],
    pictures: Annotated[int, typer.Option("--pictures", help="How many.")] = 2000,
    repeats: Annotated[int, typer.Option("--repeats", help="Turns of each; the median counts.")] = 5,
) -> None:
    """Samples a second that training is fed with, beside Ray Data, webdataset (which is to be installed) and plain
    reading of the same files."""
    from jobs.bench_training import measure_feed
    from jobs.session import ray_session

    with ray_session():
        for result in measure_feed(str(folder), pictures, repeats):
            print(json.dumps(result), flush=True)


@app.command()
def resume(
    folder: Annotated[Path, typer.Option("--dir", help="Folder for the datasets that are made.")],
    position: Annotated[int, typer.Option("--position", help="Samples that were seen before.")] = 1_000_000,
    repeats: Annotated[int, typer.Option("--repeats", help="Turns; the median counts.")] = 5,
) -> None:
    """Seconds until a dataset of 1,000 shards is open, and until its first batch from a late position on is there."""
    from jobs.bench_training import measure_resume
    from jobs.session import ray_session

    with ray_session():
        print(json.dumps(measure_resume(str(folder), position, repeats)), flush=True)


@app.command()
def checkpoints(
    folder: Annotated[Path, typer.Option("--dir", help="Folder for runs.")],
    steps: Annotated[int, typer.Option("--steps", help="Steps of each run.")] = 30,
    every: Annotated[int, typer.Option("--every", help="Steps between checkpoints.")] = 5,
) -> None:
    """Share of a run's time that it stands still for checkpoints, written beside training and at once, by turns."""
    from jobs.bench_training import measure_checkpoints
    from jobs.session import ray_session

    with ray_session():
        for result in measure_checkpoints(str(folder), steps, every):
            print(json.dumps(result), flush=True)


@app.command()
def learning(
    folder: Annotated[Path, typer.Option("--dir", help="Folder for datasets and runs. The same again goes on.")],
    easy: Annotated[Path | None, typer.Option("--easy-vqa", help="Folder of easy-VQA's tars, to study it too.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="How often each variant is trained.")] = 3,
    variants: Annotated[list[str] | None, typer.Option("--variant", help="One of the variants; else all.")] = None,
) -> None:
    """The papers' ablations in small: accuracy on held-out questions with and without each part, over seeds."""
    from jobs.bench_learning import VARIANTS, easy_vqa, measure, picture_world
    from jobs.session import ray_session

    names = variants or list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise OwlError(f"unknown variant {unknown[0]!r}; known: {', '.join(VARIANTS)}")
    with ray_session(cpus=4):
        studies = [("picture world", picture_world(folder.absolute() / "world"))]
        if easy:
            studies.append(("easy-VQA", easy_vqa(folder.absolute() / "easy-vqa", easy)))
        for title, study in studies:
            for result in measure(study, title, seeds, names):
                print(json.dumps(result), flush=True)


@app.command("easy-vqa")
def easy_vqa(
    data: Annotated[str, typer.Option("--data", help="easy-VQA's folder, or that of its tars.")],
    folder: Annotated[Path, typer.Option("--dir", help="Folder for all that is made. The same again goes on.")],
    recipe: RecipeName = "easy_vqa",
    set: Overrides = None,
) -> None:
    """A small Owl learns easy-VQA on two cores: test accuracy beside what one can answer without looking."""
    from jobs.easy_vqa import run
    from jobs.session import ray_session

    with ray_session(cpus=4):
        print(json.dumps(run(data, folder.absolute(), recipe_of(recipe, set))))


@app.command()
def engines(
    folder: Annotated[Path, typer.Option("--dir", help="Folder for the model that is made.")],
    precision: Annotated[str, typer.Option("--precision", help="fp32 or bf16.")] = "bf16",
    clients: Annotated[list[int] | None, typer.Option("--clients", help="Requests at once. Repeatable.")] = None,
    contexts: Annotated[list[int] | None, typer.Option("--context", help="Tokens of a prompt. Repeatable.")] = None,
    new: Annotated[int, typer.Option("--new", help="Tokens of an answer.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", help="Turns of each; the median counts.")] = 5,
    vllm: Annotated[str, typer.Option("--vllm", help="Python of vLLM's environment, such as .vllm/bin/python.")] = "",
    llama_server: Annotated[str, typer.Option("--llama-server", help="llama.cpp's server (needs gguf).")] = "",
) -> None:
    """An endpoint's answers beside transformers' generate, its static batches and continuous batching, and servers."""
    from jobs.bench_engines import PRECISIONS, measure

    if precision not in PRECISIONS:
        raise OwlError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    shapes = (clients or [1, 8, 16], contexts or [64, 512])
    for result in measure(str(folder), precision, *shapes, new, repeats, vllm, llama_server):
        print(json.dumps(result), flush=True)


@app.command()
def step(
    folder: Annotated[Path, typer.Option("--dir", help="Folder for the datasets that are made.")],
    recipe: RecipeName = "owl_stage1_tiny",
    steps: Annotated[int, typer.Option("--steps", help="Steps that count.")] = 10,
    set: Overrides = None,
) -> None:
    """A step of a recipe's stage, with random weights: samples and tokens a second, operations as a share of what the
    device's matrices reach, memory beside what `owl doctor` predicts."""
    from jobs.bench_papers import measure_step
    from jobs.session import ray_session

    stage = recipe_of(recipe, None).train
    if not stage:
        raise OwlError(f"recipe {recipe} is of no single stage")
    chosen = recipe_of(recipe, set, stage.removeprefix("owl2_"))
    with ray_session():
        print(json.dumps(measure_step(str(folder), recipe, chosen, steps)), flush=True)


@app.command()
def tokens(
    preset: Annotated[str, typer.Option("--preset", help="The model's shape: tiny, owl1_7b, owl2_7b.")] = "owl1_7b",
    precision: Annotated[str, typer.Option("--precision", help="fp32 or bf16.")] = "bf16",
    clients: Annotated[list[int] | None, typer.Option("--clients", help="Requests at once. Repeatable.")] = None,
    words: Annotated[int, typer.Option("--words", help="Tokens of a prompt.")] = 128,
    new: Annotated[int, typer.Option("--new", help="Tokens of an answer.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", help="Turns of each; the median counts.")] = 5,
    compiled: Annotated[bool, typer.Option("--compile", help="With room.compile.")] = False,
) -> None:
    """The built-in engine at a paper's shape, with random weights: time to the first token, with and without a picture,
    and to each later one, beside the time that the device takes to read what it must."""
    from jobs.bench_engines import PRECISIONS
    from jobs.bench_papers import measure_engine

    if precision not in PRECISIONS:
        raise OwlError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    for result in measure_engine(preset, precision, clients or [1, 8, 32], words, new, repeats, compiled):
        print(json.dumps(result), flush=True)


@app.command()
def nodes(
    most: Annotated[int, typer.Option("--nodes", help="Nodes at the end; each takes about 0.2 GB.")] = 16,
    tasks: Annotated[int, typer.Option("--tasks", help="Tasks at each size.")] = 2000,
) -> None:
    """What a Ray node costs, and how fast work is handed out over many, on one machine."""
    from jobs.bench_nodes import measure

    for result in measure(most, tasks):
        print(json.dumps(result), flush=True)


@app.command()
def gateway(
    folder: Annotated[Path, typer.Option("--dir", help="Folder for the model that is made.")],
    turns: Annotated[int, typer.Option("--turns", help="Questions of each client.")] = 50,
    pictures: Annotated[int, typer.Option("--pictures", help="Asked about twice each.")] = 9,
) -> None:
    """The gateway's own share of the time to the first token, alone and on Ray Serve; a picture asked about again."""
    from jobs.bench_gateway import measure
    from jobs.session import ray_session

    with ray_session():
        for result in measure(str(folder), turns, pictures):
            print(json.dumps(result), flush=True)


@app.command()
def serving(
    url: Annotated[str, typer.Option("--url", help="An endpoint, such as http://127.0.0.1:8000/v1.")],
    key: Annotated[str, typer.Option("--key", envvar="OWL_API_KEY", help="Its API key.")] = "none",
    model: Annotated[str, typer.Option("--model", help="The model's name there.")] = "owl",
    rates: Annotated[list[float] | None, typer.Option("--rate", help="Requests a second. Repeatable.")] = None,
    requests: Annotated[int, typer.Option("--requests", help="Of each rate.")] = 100,
    pictures: Annotated[int, typer.Option("--pictures", help="Of each request.")] = 1,
    sides: Annotated[list[int] | None, typer.Option("--side", help="Pixels of a picture's sides. Repeatable.")] = None,
    repeat: Annotated[bool, typer.Option("--repeat", help="All requests show the same pictures.")] = False,
    words: Annotated[int, typer.Option("--words", help="Of each question.")] = 50,
    tokens: Annotated[int, typer.Option("--tokens", help="Of each answer.")] = 64,
    ttft: Annotated[float, typer.Option("--ttft", help="Goodput's limit of the first token, in seconds.")] = 1.0,
    tpot: Annotated[float, typer.Option("--tpot", help="Goodput's limit of each later one, in seconds.")] = 0.1,
) -> None:
    """Open-loop load for any OpenAI-compatible endpoint: TTFT, TPOT and E2EL percentiles, throughput, goodput."""
    from jobs.bench_serving import Load, measure

    for side in sides or [224]:
        for rate in rates or [1.0]:
            load = Load(url, key, model, rate, requests, pictures, side, repeat, words, tokens)
            print(json.dumps(measure(load, ttft, tpot)), flush=True)
