"""`owl bench`: what anyone can measure for themselves. One JSON line for each thing measured, on standard output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

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
