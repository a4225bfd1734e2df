"""`owl curate`: a run, and the verbs that look into what it made."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from jobs.options import AsJson, OrRun, Overrides, RecipeName, console, finish, pairs_of, recipe_of
from jobs.session import ray_session
from pipelines.settings import with_overrides

app = typer.Typer(cls=OrRun, no_args_is_help=True, help="Raw shards to a curated dataset, and a look into it.")


def show_funnel(counted: dict[str, Any], kept: str = "kept", why: dict[str, str] | None = None) -> None:
    """Counts by reason; ``why`` has a sentence for each."""
    table = Table("", "samples", "", box=None)
    table.add_row("came in", f"{counted['in']:,}")
    for reason, number in counted["dropped"].items():
        table.add_row(f"− {reason}", f"{number:,}", (why or {}).get(reason, ""))
    table.add_row(kept, f"{counted['kept']:,}")
    Console().print(table)


@app.command()
def fetch(
    urls: Annotated[list[str], typer.Argument(help="URL lists: Parquet, JSONL or CSV files, globs, folders, s3://…")],
    out: Annotated[str, typer.Option("--out", help="Folder of the raw shards.")],
    recipe: RecipeName = "real_small",
    set: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """URL lists to raw shards, fetched politely, with a row and a reason for every URL. Settings: the recipe's
    `fetching`. Then: owl curate 'OUT/*.tar'."""
    from pipelines.fetching.download import FETCH_REASONS
    from pipelines.fetching.fetch import fetch as ask_for

    settings = recipe_of(recipe, set, "fetching").fetching
    with ray_session():
        result = ask_for(urls, out, settings)

    def show() -> None:
        show_funnel(result, "fetched", FETCH_REASONS)
        console.print(f"What became of each URL: {out}/fetched/*.parquet")

    finish({**result, "out": out}, as_json, show)


@app.command()
def run(
    raw: Annotated[list[str], typer.Argument(help="Raw shards: tar, Parquet or JSONL files, globs, folders, s3://…")],
    out: Annotated[str, typer.Option("--out", help="Folder of the curated dataset.")],
    recipe: RecipeName = "real_small",
    set: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Raw shards to a curated Arrow dataset with a ledger and a report; again, with what is new since, to its next
    version. Settings: the recipe's `curation`."""
    from pipelines.curation.curate import curate

    settings = recipe_of(recipe, set, "curation").curation
    with ray_session():
        manifest = curate(raw, out, settings)

    def show() -> None:
        show_funnel(manifest)
        console.print(f"Report: {out}/report.html")

    finish({key: manifest[key] for key in ("version", "in", "kept", "dropped")} | {"out": out}, as_json, show)


@app.command()
def preview(
    raw: Annotated[list[str], typer.Argument(help="Raw shards, as for a run.")],
    samples: Annotated[int, typer.Option("--samples", help="About how many samples are looked at.")] = 1000,
    recipe: RecipeName = "real_small",
    set: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """What a recipe's filters would do, on a few samples, in seconds; nothing is written."""
    from pipelines.curation.inspect import preview as look

    result = look(raw, recipe_of(recipe, set, "curation").curation, samples)

    def show() -> None:
        show_funnel(result)
        for reason, found in result["examples"].items():
            for item in found:
                Console().print(f"  {reason}  {item['key']}  {item['detail'] or ''}", highlight=False, markup=False)

    finish(result, as_json, show)


@app.command()
def explain(
    out: Annotated[str, typer.Argument(help="Folder of a curated dataset.")],
    key: Annotated[str, typer.Argument(help="A sample's key.")],
    as_json: AsJson = False,
) -> None:
    """Everything known of one sample: verdict, reason, statistics, where it came from and where it lies."""
    from pipelines.curation.inspect import explain as find

    rows = find(out, key)

    def show() -> None:
        for row in rows:
            table = Table(key, "", box=None)
            for name, value in row.items():
                if value is not None and name != "key":
                    table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
            Console().print(table)

    finish({"rows": rows}, as_json, show)


@app.command()
def diff(
    before: Annotated[str, typer.Argument(help="Folder of a curated dataset, or a version of it, FOLDER@1.")],
    after: Annotated[str, typer.Argument(help="Folder of another, of the same raw shards.")],
    as_json: AsJson = False,
) -> None:
    """What became of the same raw samples in two curated datasets."""
    from pipelines.curation.inspect import diff as compare

    result = compare(before, after)

    def show() -> None:
        table = Table("", "samples", box=None)
        table.add_row("the same", f"{result['same']:,}")
        for change, number in result["moved"].items():
            table.add_row(change, f"{number:,}")
        Console().print(table)
        for side, shards in (("before", result["only_before"]), ("after", result["only_after"])):
            if shards:
                more = " …" if shards[1:] else ""
                Console().print(f"{counted(len(shards))} only in {side}: {shards[0]}{more}", highlight=False)

    finish(result, as_json, show)


def counted(shards: int) -> str:
    return f"{shards:,} raw {'shard' if shards == 1 else 'shards'}"


@app.command()
def versions(
    out: Annotated[str, typer.Argument(help="Folder of a curated dataset.")],
    as_json: AsJson = False,
) -> None:
    """A dataset's versions. FOLDER@3 names one wherever a dataset is read: owl train --data, curate diff, export."""
    from pipelines.curation.versions import history

    told = history(out)

    def show() -> None:
        table = Table("version", "made", "by", "raw shards", "kept", "more", box=None)
        for entry in told:
            table.add_row(
                str(entry["version"]),
                entry["made"],
                entry["by"],
                *(f"{entry[n]:,}" for n in ("shards", "kept", "more")),
            )
        Console().print(table)

    finish({"versions": told}, as_json, show)


@app.command()
def rollback(
    out: Annotated[str, typer.Argument(help="Folder of a curated dataset.")],
    to: Annotated[int, typer.Option("--to", help="The version whose content comes back, as the next version.")],
    as_json: AsJson = False,
) -> None:
    """Brings an earlier version back. Raw shards that came after it are withdrawn: later runs leave them out, until a
    version that had them is brought back."""
    from pipelines.curation.versions import roll_back

    manifest = roll_back(out, to)
    told = {name: manifest[name] for name in ("version", "in", "kept")} | {"withdrawn": len(manifest["withdrawn"])}

    def show() -> None:
        console.print(
            f"{out} is at version {told['version']}, which is version {to} again: {told['kept']:,} samples; "
            f"{counted(told['withdrawn'])} withdrawn"
        )

    finish(told, as_json, show)


@app.command()
def rethreshold(
    out: Annotated[str, typer.Argument(help="Folder of a curated dataset.")],
    set: Annotated[list[str], typer.Option("--set", help="A limit, as key=value: min_words=4. Repeatable.")],
    as_json: AsJson = False,
) -> None:
    """Holds a dataset to other limits by the statistics in its ledger. Tighter ones open no picture; looser ones only
    the raw samples that they may let in."""
    from pipelines.curation.filters import Limits
    from pipelines.curation.ledger import manifest_of
    from pipelines.curation.rethreshold import rethreshold as move

    pairs = {key.removeprefix("limits."): value for key, value in pairs_of(set).items()}
    limits = with_overrides(Limits.model_validate(manifest_of(out)["settings"]["limits"]), pairs)
    with ray_session():
        manifest = move(out, limits)

    def show() -> None:
        show_funnel(manifest)
        console.print(f"{manifest['read_again']:,} raw samples were read again")

    finish({key: manifest[key] for key in ("in", "kept", "dropped", "read_again")}, as_json, show)


@app.command()
def export(
    dataset: Annotated[str, typer.Argument(help="Folder of a curated dataset.")],
    out: Annotated[str, typer.Option("--out", help="Folder for the files.")],
    to: Annotated[str, typer.Option("--to", help="webdataset, parquet or arrow.")] = "webdataset",
    megabytes: Annotated[int, typer.Option("--megabytes", help="About how large each file becomes.")] = 500,
    as_json: AsJson = False,
) -> None:
    """Writes a curated dataset for other tools, in files of about one size."""
    from pipelines.curation.export import export as write

    with ray_session():
        result = write(dataset, out, to, megabytes)
    finish(result, as_json, lambda: console.print(f"{result['rows']:,} samples in {result['files']:,} files in {out}"))
