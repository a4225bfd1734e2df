"""Typed settings: a wrong name, type or combination is refused where it is built, by name."""

from __future__ import annotations

import difflib
import hashlib
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines import storage


class OwlError(Exception):
    """Something the user can mend. Its message is one sentence; the command line prints it without a traceback."""


class SettingError(OwlError):
    """A setting that does not exist or cannot hold."""


class Settings(BaseModel):
    """Base of every group of settings. The text under a field is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    def fingerprint(self) -> str:
        """Short hash of all values: equal settings, equal fingerprint."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]


def differences(old: dict, new: dict) -> str:
    """ "steps 100 → 200, seed 0 → 1": what changed between two resolved settings."""
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return ", ".join(f"{name} {json.dumps(old.get(name))} → {json.dumps(new.get(name))}" for name in names)


def refuse_other_settings(output: str, settings: Settings) -> None:
    """A folder holds the results of one set of settings. Raises OwlError where it was made with others, by name."""
    path = f"{output}/settings.json"
    if storage.exists(path):
        before = storage.read_json(path)
        if changed := differences(flat(before), flat(settings.model_dump())):
            raise OwlError(f"{output} was made with other settings ({changed}); choose another folder")
    storage.write_json(path, settings.model_dump())


def flat(settings: dict, prefix: str = "") -> dict:
    """{"limits": {"min_words": 2}} → {"limits.min_words": 2}"""
    out: dict = {}
    for name, value in settings.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


AnySettings = TypeVar("AnySettings", bound=Settings)


def with_overrides(settings: AnySettings, overrides: dict[str, str]) -> AnySettings:
    """A copy with ``overrides`` such as {"min_words": "3"} or {"stage1.steps": "100"}, parsed by the fields' types.

    Raises SettingError naming the setting, and the nearest real one if it was misspelt.
    """
    values = settings.model_dump()
    for path, text in overrides.items():
        group: Any = values
        model: Any = settings
        *parents, name = path.split(".")
        for parent in parents:
            refuse_unknown(parent, path, group)
            group, model = group[parent], model[parent] if isinstance(model, dict) else getattr(model, parent)
        refuse_unknown(name, path, group)
        group[name] = parse(text, group[name])
    try:
        return type(settings).model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # one of ours: settings that contradict each other
            raise SettingError(first["msg"].removeprefix("Value error, ")) from None
        place = ".".join(str(part) for part in first["loc"])
        raise SettingError(f"setting {place} cannot be {first['input']!r}: {first['msg']}") from None


def refuse_unknown(name: str, path: str, group: Any) -> None:
    if not isinstance(group, dict):
        raise SettingError(f"unknown setting {path!r}: it has no part {name!r}")
    if name not in group:
        near = difflib.get_close_matches(name, group, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(sorted(group))}"
        raise SettingError(f"unknown setting {path!r}{hint}")


def parse(text: str, current: Any) -> Any:
    """JSON where it reads as such ("3", "true", "[1,2]"), a string otherwise."""
    if isinstance(current, str):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
