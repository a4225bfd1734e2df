"""An endpoint from a Serve config file: what `owl serve --config FILE` and `serve deploy FILE` read."""

from __future__ import annotations

import time
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from ray import serve
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from pipelines import storage
from pipelines.serving.options import Serving
from pipelines.serving.serve import QUIET, build
from pipelines.settings import OwlError, Settings


class Deployed(Settings):
    """The args of an application in a Serve config file."""

    model: str
    """A model folder that all machines see."""
    serving: Serving = Serving()
    """As in a recipe; host and port stand in the file's http_options."""


def from_config(args: dict[str, Any]) -> serve.Application:
    """What a Serve config file's import_path names. Raises OwlError for an unknown setting, by its name."""
    chosen = checked(Deployed, args, "args")
    return build(chosen.model, chosen.serving)


def deploy(path: str, dashboard: str = "") -> str:
    """Deploys a Serve config file, refusing what Serve would disregard; returns the address. A later file of the same
    application replaces its replicas one after another. With ``dashboard``, an address such as http://host:8265, from
    outside of the cluster; without, from within it. Raises OwlError where an application does not come up."""
    told = yaml.safe_load(storage.read_bytes(path))
    refuse_unknown(told, ServeDeploySchema, path)
    refuse_unknown(told.get("http_options", {}), HTTPOptions, f"{path}, http_options")
    for number, given in enumerate(told.get("applications", [])):
        refuse_unknown(given, ServeApplicationSchema, f"{path}, applications.{number}")
        checked(Deployed, given.get("args", {}), f"{path}, applications.{number}.args")
    schema = checked(ServeDeploySchema, told, path)
    options = {"host": "127.0.0.1", "port": 8000, **told.get("http_options", {})}
    if dashboard:
        deploy_through(dashboard, {"logging_config": QUIET, **told, "http_options": options}, path)
    else:
        serve.start(http_options=options, logging_config=QUIET)
        client = _get_global_client()
        refuse_other_options(client.get_serve_details(), options, path)
        client.deploy_apps(schema, _blocking=True)
    return f"http://{options['host']}:{options['port']}"


def refuse_other_options(details: dict[str, Any], options: dict[str, Any], path: str) -> None:
    """Serve listens where it began to, and disregards what a later file says of it."""
    running = details.get("http_options") or {}
    for name, value in options.items():
        if name in running and running[name] != value:
            raise OwlError(
                f"{path}, http_options.{name}: {value!r}, but Serve runs there with {running[name]!r}, and keeps it "
                "for as long as it runs; write that, or end it first (serve shutdown)"
            )


def deploy_through(dashboard: str, config: dict[str, Any], path: str) -> None:
    try:
        client = ServeSubmissionClient(dashboard)
        refuse_other_options(client.get_serve_details(), config["http_options"], path)
        client.deploy_applications(config)
    except (ConnectionError, RuntimeError) as error:
        raise OwlError(f"{dashboard} did not take the file: {str(error).strip().splitlines()[0]}") from None
    names = {application["name"] for application in config["applications"]}
    while True:
        time.sleep(1)
        there = client.get_serve_details().get("applications", {})
        for name in names & there.keys():
            if there[name]["status"] in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise OwlError(f"application {name} did not come up: {reason(there[name])}")
        if all(there.get(name, {}).get("status") == "RUNNING" for name in names):
            return


def reason(application: dict[str, Any]) -> str:
    """Serve tells a replica's whole traceback, whose last line says why."""
    parts = [part["message"] for part in application["deployments"].values() if part["status"] != "HEALTHY"]
    lines = [line.strip() for message in parts or [application["message"]] for line in message.splitlines()]
    return next((line for line in reversed(lines) if line), application["status"])


def refuse_unknown(given: Any, schema: type[BaseModel], place: str) -> None:
    """Serve accepts misspelt keys, and disregards them."""
    if not isinstance(given, dict):
        raise OwlError(f"{place}: a mapping is meant to stand here")
    for name in given:
        if name not in schema.model_fields:
            raise OwlError(f"{place}: there is no {name!r}; there are {', '.join(schema.model_fields)}")


Schema = TypeVar("Schema", bound=BaseModel)


def checked(schema: type[Schema], given: Any, place: str) -> Schema:
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise OwlError(f"{place}: {name}: {first['msg']}") from None
