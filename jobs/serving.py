"""`owl serve`: an endpoint on this machine or a cluster; `owl batch`: a file of requests; `owl keys`: who may ask."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from jobs.options import AsJson, Overrides, RecipeName, console, finish, recipe_of
from jobs.session import ray_session
from pipelines.settings import OwlError

app = typer.Typer()
keys = typer.Typer(no_args_is_help=True, help="Who may ask an endpoint, and how much.")


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A model folder; leave it out with --config.")] = "",
    port: Annotated[int | None, typer.Option("--port", help="Port to listen on.")] = None,
    config: Annotated[
        str, typer.Option("--config", help="A Serve config file, deployed to the cluster of RAY_ADDRESS.")
    ] = "",
    alone: Annotated[bool, typer.Option("--alone", help="In one process, without Ray.")] = False,
    recipe: RecipeName = "real_small",
    set: Overrides = None,
) -> None:
    """Serves a model behind OpenAI's API, on this machine only, until Ctrl-C. Settings: the recipe's `serving`."""
    from pipelines.serving import serve as serving
    from pipelines.serving.keys import new_key

    if bool(model) == bool(config):
        raise OwlError("name either a model folder or --config, not both")
    if config:
        from pipelines.serving.deploy import deploy

        if (dashboard := os.environ.get("RAY_ADDRESS", "")).startswith("http"):
            console.print(f"Deployed {config} at {deploy(config, dashboard)}")
            return
        with ray_session():
            console.print(f"Deployed {config} at {deploy(config)}")
        return
    settings = recipe_of(recipe, set, "serving").serving
    if port is not None:
        settings = settings.model_copy(update={"port": port})
    secret, made = "", None
    if not (settings.keys or settings.no_keys):
        secret, made = new_key("default")
    folder = str(Path(model).absolute())

    def tell(address: str) -> None:
        question = {"model": settings.name, "messages": [{"role": "user", "content": "hello"}]}
        key = secret or ("" if settings.no_keys else "$OWL_API_KEY")
        console.print(f"Serving {model} at {address}/v1 as {settings.name!r}. Ctrl-C ends it. Try:")
        asked = f" -H 'authorization: Bearer {key}'" if key.startswith("sk-") else ""
        asked = asked or (f' -H "authorization: Bearer {key}"' if key else "")
        print(
            f"curl {address}/v1/chat/completions{asked} -H 'content-type: application/json' -d '{json.dumps(question)}'"
        )
        console.print(f"In the browser: {address}/{f'#key={secret}' if secret else ''}", soft_wrap=True)
        sys.stdout.flush()

    logging.getLogger("owl.serving").setLevel(logging.INFO)
    if alone:
        asyncio.run(serving.alone(folder, settings, made, tell))
        return
    serving.build(folder, settings, made)  # refuses a missing folder before Ray starts
    with ray_session(), serving.running(folder, settings, made) as address:
        tell(address)
        while True:
            time.sleep(1)


@app.command()
def batch(
    requests: Annotated[str, typer.Argument(help="A JSONL file of requests, in OpenAI's batch format.")],
    model: Annotated[str, typer.Option("--model", help="A model folder.")],
    out: Annotated[str, typer.Option("--out", help="JSONL file of the answers.")],
    actors: Annotated[int, typer.Option("--actors", help="Engines at once.")] = 1,
    recipe: RecipeName = "real_small",
    set: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Answers a file of requests into another, without an endpoint. Settings: the recipe's `serving`."""
    from pipelines.serving.batch import answer_file

    settings = recipe_of(recipe, set, "serving").serving
    with ray_session():
        counts = answer_file(requests, out, str(Path(model).absolute()), settings, actors)
    told = ", ".join(f"{number} × {status}" for status, number in counts.items())
    finish({"out": out, **counts}, as_json, lambda: console.print(f"{out}: {told}"))


@keys.command()
def add(
    name: Annotated[str, typer.Argument(help="What the key is called in metrics and logs.")],
    file: Annotated[str, typer.Option("--file", help="The file of keys; holds hashes alone.")],
    requests: Annotated[int | None, typer.Option("--requests", help="Requests it may make a minute.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Tokens it may spend a minute.")] = None,
    pictures: Annotated[int | None, typer.Option("--pictures", help="Pictures it may show a minute.")] = None,
) -> None:
    """Makes a key, and prints its secret, once. A running endpoint knows it after its next start."""
    from pipelines.serving.keys import add_key

    limits = {"requests_a_minute": requests, "tokens_a_minute": tokens, "pictures_a_minute": pictures}
    print(add_key(file, name, **limits))
