"""The `owl` command: one verb for each part of the way.

What the user can mend ends in one sentence and exit status 1; what they typed wrongly in usage and status 2.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from jobs import bench, cluster, curation, evaluation, serving, submit
from jobs.options import AsJson, Overrides, RecipeName, console, finish, recipe_of
from jobs.session import prepare_environment, ray_session
from pipelines import storage
from pipelines.settings import OwlError, Settings

prepare_environment()
app = typer.Typer(
    help="From raw image-caption shards to an answering vision-language endpoint, on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(bench.app, name="bench")
app.add_typer(curation.app, name="curate")
app.add_typer(evaluation.app, name="eval")
app.add_typer(serving.app)
app.add_typer(serving.keys, name="keys")
app.add_typer(cluster.app, name="cluster")
app.add_typer(submit.app)
app.add_typer(submit.jobs, name="jobs")


@app.command()
def demo(
    dir: Annotated[Path, typer.Option("--dir", help="Folder for everything the demo makes.")] = Path("owl-demo"),
    recipe: RecipeName = "demo",
    set: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """The whole way once: draw a world, curate, train, evaluate, serve. No download, no GPU, minutes."""
    from jobs.demo import run

    chosen = recipe_of(recipe, set)
    with ray_session(cpus=4):
        summary = run(str(dir), chosen)
    finish(summary, as_json, lambda: None)


@app.command()
def train(
    stage: Annotated[str, typer.Argument(help="What trains, a row of the table of stages; else the recipe's.")] = "",
    data: Annotated[
        list[str] | None, typer.Option("--data", help="A curated dataset's folder. May be repeated.")
    ] = None,
    run: Annotated[
        str, typer.Option("--run", help="The run's folder, also s3://: log, checkpoints, and the model it ends with.")
    ] = "owl-run",
    start: Annotated[
        str, typer.Option("--start", help="Model folder or run to begin from; without it, the recipe's parts.")
    ] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with --run, by the settings it began with.")] = False,
    recipe: RecipeName = "real_small",
    set: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """One stage of training. The same command again goes on from the last checkpoint. Settings: the stage's."""
    from jobs.parts import assemble
    from pipelines.training.stages import STAGES
    from pipelines.training.train import begun_with
    from pipelines.training.train import train as fit

    given = [f"data={json.dumps(data)}"] if data else []
    if resume:
        stage, before = begun_with(run)
        given = [f"{name}={value}" for name, value in before.items()]
    stage = stage or recipe_of(recipe, None).train
    if stage not in STAGES:
        raise OwlError(f"unknown stage {stage!r}; known: {', '.join(STAGES)}")
    group = stage.removeprefix("owl2_")
    chosen = recipe_of(recipe, given + (set or []), group)
    settings = getattr(chosen, group)
    start = start or settings.start
    if not start:
        if group == "stage2":
            raise OwlError(f"{stage} begins from a model of stage 1: name its folder or run with --start")
        start = f"{run}/parts"
        with storage.folder_for(start) as here:
            assemble(chosen.parts, here)
    settings = settings.model_copy(update={"start": start})
    with ray_session():
        log = fit(stage, settings, run)

    def show() -> None:
        table = Table("module", "trainable", "parameters", box=None)
        for name, count in log["parameters"].items():
            table.add_row(name, f"{count['trainable']:,}", f"{count['total']:,}")
        Console().print(table)
        last = log["history"][-1]
        console.print(f"Step {last['step']}, loss {last['loss']:.4f}. Model: {run}/model")

    finish({"model": f"{run}/model", **log["history"][-1]}, as_json, show)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A model folder; leave it out with --url.")] = "",
    url: Annotated[
        str, typer.Option("--url", help="An endpoint instead of a folder, such as http://host:8000/v1.")
    ] = "",
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="A picture to begin with. May be repeated.")
    ] = None,
    key: Annotated[str, typer.Option("--key", envvar="OWL_API_KEY", help="The endpoint's API key.")] = "none",
    question: Annotated[str, typer.Option("--question", "-q", help="Ask this one thing and end.")] = "",
    bits: Annotated[int | None, typer.Option("--bits", help="8 or 4: quantizes the folder's language model.")] = None,
    replay: Annotated[
        Path | None,
        typer.Option("--replay", help="An endpoint's answer with its receipt, given again from the folder."),
    ] = None,
    adapter: Annotated[str, typer.Option("--adapter", help="With --replay: the folder of the receipt's adapter.")] = "",
) -> None:
    """Talk to a model folder or an endpoint. In the conversation: /image PATH adds a picture, /new starts afresh."""
    from jobs.chat import Endpoint, Folder, talk

    if replay:
        from jobs.replay import replay as repeat

        answers = repeat(replay, model, image or [], adapter)
        for answer in answers:
            print(answer["text"])
        if not all(answer["same"] for answer in answers):
            raise OwlError("the tokens are not those of the receipt")
        console.print("the same tokens as in the receipt")
        return
    if bool(model) == bool(url):
        raise OwlError("name either a model folder or --url, not both")
    talk(Endpoint(url, key) if url else Folder(model, bits), image or [], question)


@app.command()
def convert(
    out: Annotated[Path, typer.Option("--out", help="Folder of the model that is written.")],
    model: Annotated[
        str, typer.Argument(help="A model folder, ours or the authors'; leave it out for new parts.")
    ] = "",
    to: Annotated[str, typer.Option("--to", help="owl (ours) or official (the authors' names and files).")] = "owl",
    vision: Annotated[str, typer.Option("--vision", help="A new model's vision backbone: a folder.")] = "",
    language_model: Annotated[
        str, typer.Option("--language-model", help="A new model's causal language model: a folder.")
    ] = "",
    template: Annotated[
        str, typer.Option("--template", help="A new model's template: owl1, owl2, chatml, plain.")
    ] = "",
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="Gives a new model mPLUG-Owl2's modality-adaptive module.")
    ] = False,
) -> None:
    """Rewrites a model folder, or starts a new model from foundation parts."""
    from jobs.parts import assemble, rewrite
    from jobs.recipes import Parts

    if bool(model) == bool(vision or language_model):
        raise OwlError("name either a model folder, or --vision and --language-model")
    if model:
        rewrite(model, to, str(out))
    else:
        chosen = template or ("owl2" if adaptive else "owl1")
        parts = Parts(vision=vision, language_model=language_model, adaptive=adaptive, template=chosen)
        assemble(parts, str(out))
    console.print(f"Model: {out}")


@app.command()
def doctor(
    recipe: Annotated[str, typer.Option("--recipe", help="A recipe of training, checked as a whole.")] = "",
    model: Annotated[str, typer.Option("--model", help="A preset (tiny, owl1_7b, owl2_7b) or a model folder.")] = "",
    stage: Annotated[str, typer.Option("--stage", help="A stage of training, or inference.")] = "",
    data: Annotated[list[str] | None, typer.Option("--data", help="A curated dataset's folder.")] = None,
    start: Annotated[str, typer.Option("--start", help="Model folder or run that training is to begin from.")] = "",
    run: Annotated[str, typer.Option("--run", help="The run's folder, where there must be room.")] = "owl-run",
    gigabytes: Annotated[float, typer.Option("--memory", help="GB that a worker has; else what is found here.")] = 0,
    teraflops: Annotated[float, typer.Option("--rate", help="10¹² operations a second a worker; else measured.")] = 0,
    batch: Annotated[int, typer.Option("--batch", help="With --model: samples at once on one device.")] = 1,
    length: Annotated[int, typer.Option("--length", help="With --model: tokens of a sample, its pictures' too.")] = 512,
    pictures: Annotated[int, typer.Option("--pictures", help="With --model: pictures of a sample.")] = 1,
    dtype: Annotated[str, typer.Option("--dtype", help="With --model: float32 or bfloat16.")] = "float32",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="With --model: activations are computed anew for the backward pass.")
    ] = False,
    set: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """What a job will need, and whether all is there for it, before it starts."""
    from jobs import doctor as checks

    if bool(recipe) == bool(model):
        raise OwlError("name a --recipe to check as a whole, or a --model to count")
    if recipe:
        chosen = recipe_of(recipe, set)
        found = checks.examine(chosen, stage, data or [], start, run, gigabytes, teraflops)
        finish(found, as_json, lambda: checks.show(found))
        if not all(check["good"] for check in found["checks"]):
            raise OwlError("something is missing; see above")
        return
    chosen = recipe_of("owl_stage2", set)
    sizes = checks.memory(
        model,
        stage or "stage2",
        batch=batch,
        length=length,
        pictures=pictures,
        dtype=dtype,
        checkpointing=checkpointing,
        lora=chosen.stage2.lora,
    )

    def show() -> None:
        table = Table("memory of one device", "GiB", box=None)
        for name, count in sizes.items():
            table.add_row(name, f"{count / 2**30:,.2f}")
        Console().print(table)

    finish(sizes, as_json, show)


@app.command()
def recipes(
    name: Annotated[str, typer.Argument(help="Show this recipe's settings with their help.")] = "",
) -> None:
    """Lists the named recipes, or explains one."""
    from jobs.recipes import RECIPES, load

    if not name:
        for known, make in RECIPES.items():
            Console().print(f"[bold]{known}[/bold]  {make().about}", highlight=False)
        return
    explain(load(name))


def explain(settings: Settings, prefix: str = "") -> None:
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Settings):
            Console().print(f"\n[bold]{prefix}{name}[/bold]  {field.description or ''}", highlight=False)
            explain(value, f"{prefix}{name}.")
        else:
            Console().print(f"  {prefix}{name} = {value!r}  [dim]{field.description or ''}[/dim]", highlight=False)


def main() -> None:
    """Entry point of `owl`."""
    try:
        app()
    except OwlError as error:
        console.print(f"owl: {error}", markup=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
