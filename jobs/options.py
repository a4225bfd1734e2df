"""What the verbs share: options, a recipe with settings changed, and how a result is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from pipelines.settings import SettingError, with_overrides

console = Console(stderr=True, highlight=False)

RecipeName = Annotated[str, typer.Option("--recipe", help="A named recipe; `owl recipes` lists them.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="One setting of the recipe, as key=value. May be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON on standard output.")]


class OrRun(TyperGroup):
    """`owl curate RAW …` is `owl curate run RAW …`, and so on."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        first_is_command = not args or args[0] in self.commands or args[0] == "--help"
        return super().parse_args(ctx, args if first_is_command else ["run", *args])


def recipe_of(name: str, overrides: list[str] | None, group: str = ""):
    """The recipe with ``--set`` applied; bare keys belong to ``group``."""
    from jobs.recipes import load

    known = type(load(name)).model_fields
    pairs = {
        key if not group or key.split(".")[0] in known else f"{group}.{key}": value
        for key, value in pairs_of(overrides or []).items()
    }
    return with_overrides(load(name), pairs)


def pairs_of(given: list[str], option: str = "--set") -> dict[str, str]:
    """["a=1"] → {"a": "1"}. Raises SettingError for an item without an equals sign."""
    pairs = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals:
            raise SettingError(f"{option} takes key=value, not {item!r}")
        pairs[key] = value
    return pairs


def finish(result: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps(result))
    else:
        show()
