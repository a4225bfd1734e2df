"""`owl eval`: a run, scores of predictions, grades by a judge and by people, and two models beside each other."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from jobs.options import AsJson, OrRun, Overrides, RecipeName, console, finish, recipe_of
from jobs.session import ray_session
from pipelines.settings import OwlError

app = typer.Typer(cls=OrRun, no_args_is_help=True, help="A model folder's answers to a benchmark, scored and compared.")

Name = Annotated[str, typer.Option("--benchmark", help="A benchmark's name; `owl eval benchmarks` lists them.")]
Data = Annotated[str, typer.Option("--data", help="The benchmark's files: a folder, also s3://…")]


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="A model folder. Not needed with --decontaminate.")] = "",
    benchmark: Annotated[
        str,
        typer.Option("--benchmark", help="A name, several with commas, `all`, or caption_loss."),
    ] = "",
    data: Annotated[str, typer.Option("--data", help="Its files; of several, folders by their names.")] = "",
    out: Annotated[str, typer.Option("--out", help="Folder for answers, results and the report.")] = "",
    decontaminate: Annotated[
        str,
        typer.Option("--decontaminate", help="A curated dataset, out of which the benchmark's samples are selected."),
    ] = "",
    recipe: RecipeName = "real_small",
    set: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Answers a benchmark's questions and reports scores. Settings: the recipe's `evaluation`. With --decontaminate:
    finds the benchmark's pictures and questions in a curated dataset, and leaves them out of what it selects."""
    for option, value in {"--benchmark": benchmark, "--data": data}.items():
        if not value:
            raise OwlError(f"name {option}")
    if bool(model) == bool(decontaminate):
        raise OwlError("name a model folder to ask, or --decontaminate DATASET")
    if decontaminate:
        clean(decontaminate, benchmark, data, as_json)
        return
    if not out:
        raise OwlError("name --out, a folder for the results")
    from pipelines.evaluation.caption_loss import compare_losses
    from pipelines.evaluation.evaluate import evaluate, evaluate_several

    settings = recipe_of(recipe, set, "evaluation").evaluation
    with ray_session():
        if benchmark == "caption_loss":
            losses = compare_losses(model, [data], out, settings)
            finish(losses, as_json, lambda: show_losses(losses))
        elif benchmark == "all" or "," in benchmark:
            table = evaluate_several(model, benchmark, data, out, settings)
            finish(table, as_json, lambda: show_table(table, out))
        else:
            results = evaluate(model, benchmark, data, out, settings)
            finish(results, as_json, lambda: show_results(results, out))


def show_losses(results: dict) -> None:
    low, high = results["interval"]
    Console().print(
        f"loss per token with the right picture {results['right']:.4f}, with a wrong one {results['wrong']:.4f}; "
        f"difference {results['difference']:.4f}, 95 % interval {low:.4f} to {high:.4f} "
        f"({results['captions']} captions of {results['pictures']} pictures)"
    )


def show_table(found: dict, out: str) -> None:
    table = Table(*found["head"], box=None)
    for row in found["rows"]:
        table.add_row(*row)
    Console().print(table)
    console.print(f"Table: {out}/table.html · each benchmark's own report: {out}/NAME/report.html")


def show_results(results: dict, out: str) -> None:
    from pipelines import storage
    from pipelines.evaluation.report import score_head, score_rows

    if results["scores"].get("picture"):
        table = Table(*score_head(results["scores"]), box=None)
        for row in score_rows(results["scores"]):
            table.add_row(*row)
        Console().print(table)
    show_headline(results)
    if results["failed"]:
        console.print(f"{results['failed']} questions failed; the report tells why")
    if waiting := results["questions"] - results["graded"]:
        console.print(f"{waiting} answers wait for grades: owl eval judge {out} --url …, or owl eval rate {out}")
    speed = storage.read_json(f"{out}/run.json")
    console.print(
        f"{speed['answers']:,} answers at {speed['answers_per_second']:.3g} a second. Report: {out}/report.html"
    )


def show_headline(results: dict) -> None:
    if found := results["headline"]:
        Console().print(
            f"{found['name']} {found['value']:.4g}, 95 % interval {found['low']:.4g} to {found['high']:.4g}"
        )


def clean(dataset: str, benchmark: str, data: str, as_json: bool) -> None:
    from jobs.curation import show_funnel
    from pipelines.evaluation.decontaminate import decontaminate

    with ray_session():
        found = decontaminate(dataset, benchmark, data)
    finish(found, as_json, lambda: show_funnel(found))


@app.command()
def score(
    predictions: Annotated[str, typer.Argument(help="JSON lines: a question's facts with its prediction.")],
    benchmark: Name,
) -> None:
    """Scores raw predictions of any model, and prints one JSON object of metrics."""
    import json

    from pipelines import storage
    from pipelines.evaluation.benchmarks.base import read_lines
    from pipelines.evaluation.results import score_predictions

    if not storage.exists(predictions):
        raise OwlError(f"no predictions at {predictions!r}")
    print(json.dumps(score_predictions(benchmark, read_lines(predictions))))


@app.command()
def judge(
    out: Annotated[str, typer.Argument(help="The folder of an evaluation.")],
    url: Annotated[str, typer.Option("--url", help="An OpenAI-compatible endpoint, such as http://host:8000/v1.")],
    model: Annotated[str, typer.Option("--model", help="The judge's name there.")],
    as_json: AsJson = False,
) -> None:
    """Has a language model grade open answers, by the benchmark's rubric. The key is read from OPENAI_API_KEY."""
    import os

    from pipelines.evaluation.grading import judge as ask_judge

    results = ask_judge(out, url, model, os.environ.get("OPENAI_API_KEY", "none"))

    def show() -> None:
        show_headline(results)
        if results["unreadable"]:
            console.print(f"{results['unreadable']} of the judge's answers held no grade")
        console.print(f"Grades with the rubric beside: {out}/grades · Report: {out}/report.html")

    finish(results, as_json, show)


@app.command()
def rate(
    out: Annotated[str, typer.Argument(help="The folder of an evaluation, on this machine.")],
    also: Annotated[
        list[str] | None,
        typer.Option("--also", help="Another system: an evaluation's folder, or JSON lines of published answers."),
    ] = None,
    port: Annotated[int, typer.Option("--port", help="Port to listen on, on this machine only.")] = 8010,
) -> None:
    """Opens a page where people grade answers A to D without knowing whose they are, until Ctrl-C."""
    import uvicorn

    from pipelines.evaluation.rating import application, study_of
    from pipelines.evaluation.rating import finish as conclude

    study = study_of(out, also or [])
    console.print(f"Grade {len(study.answers)} systems at http://127.0.0.1:{port}. Ctrl-C ends it.")
    try:
        uvicorn.run(application(study), host="127.0.0.1", port=port, log_level="warning")
    finally:
        conclude(study)
        console.print(f"Tables: {out}/ratings.json · grades: {out}/ratings.jsonl · Report: {out}/report.html")


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="The folder of an evaluation.")],
    second: Annotated[str, typer.Argument(help="Another model's, of the same questions.")],
    out: Annotated[str, typer.Option("--out", help="Folder for compare.json and compare.html.")],
    as_json: AsJson = False,
) -> None:
    """Two models on the same questions: the difference with a paired interval, and where they differ."""
    from pipelines import storage
    from pipelines.evaluation import results
    from pipelines.evaluation.report import write_comparison

    found, pairs = results.compare(first, second)
    storage.write_json(f"{out}/compare.json", found)
    write_comparison(f"{out}/compare.html", found, pairs)

    def show() -> None:
        Console().print(
            f"mean score {found['first']['mean']:.2%} and {found['second']['mean']:.2%}: second - first "
            f"{found['difference']:+.2%}, 95 % interval {found['low']:+.2%} to {found['high']:+.2%}; the first answers "
            f"{found['only_first_better']} of {found['questions']} questions better, the second "
            f"{found['only_second_better']}"
        )
        console.print(f"Where they differ: {out}/compare.html")

    finish(found, as_json, show)


@app.command()
def benchmarks(
    name: Annotated[str, typer.Argument(help="Tell all of this one.")] = "",
) -> None:
    """Lists the benchmarks, or tells of one what is asked, which files it reads and who publishes them."""
    from pipelines.evaluation.benchmarks import BENCHMARKS, named

    if not name:
        table = Table("benchmark", "asks", box=None)
        for known, benchmark in BENCHMARKS.items():
            table.add_row(known, benchmark.about)
        Console().print(table)
        return
    chosen = named(name)
    table = Table(box=None, show_header=False)
    for label in ("version", "about", "source", "layout", "headline", "max_new_tokens"):
        table.add_row(label, str(getattr(chosen, label)))
    for system, value in chosen.published.items():
        table.add_row(f"published · {system}", f"{value:g}")
    Console().print(table)
