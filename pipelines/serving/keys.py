"""Who may ask, and how much: API keys, known by their hashes, and what each may spend a minute."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from pathlib import Path

from pydantic import Field, PositiveInt, ValidationError

from pipelines import storage
from pipelines.settings import OwlError, Settings


class Key(Settings):
    """A key's line in a file of keys."""

    name: str = Field(pattern="^[A-Za-z0-9_.-]{1,64}$")
    """What it is called in metrics and logs."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Of the secret, which is kept nowhere."""
    requests_a_minute: PositiveInt | None = None
    tokens_a_minute: PositiveInt | None = None
    """Of prompts, and of answers as long as they may become."""
    pictures_a_minute: PositiveInt | None = None


UNITS = ("requests", "tokens", "pictures")
OPEN = Key(name="anyone", sha256="0" * 64)
"""Whose requests they are where no key is asked for."""


def hashed(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def new_key(name: str, **limits: int | None) -> tuple[str, Key]:
    """A secret, told once, and what is written down of it. Secrets are 256 random bits, so a plain hash holds."""
    secret = f"sk-owl-{secrets.token_urlsafe(32)}"
    try:
        return secret, Key(name=name, sha256=hashed(secret), **limits)
    except ValidationError as error:
        first = error.errors()[0]
        raise OwlError(f"{first['loc'][0]}: {first['msg']}") from None


def read_keys(path: str) -> dict[str, Key]:
    """Hash → key, of a file with one JSON object a line. Raises OwlError."""
    found: dict[str, Key] = {}
    try:
        lines = storage.read_bytes(path).decode().splitlines()
    except FileNotFoundError:
        raise OwlError(f"there is no file of keys at {path}; `owl keys add NAME --file {path}` begins one") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            key = Key.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise OwlError(f"{path}, line {number}: {place or 'line'}: {first['msg']}") from None
        if any(key.name == other.name for other in found.values()):
            raise OwlError(f"{path}, line {number}: there are two keys called {key.name!r}")
        found[key.sha256] = key
    if not found:
        raise OwlError(f"{path} holds no key")
    return found


def add_key(path: str, name: str, **limits: int | None) -> str:
    """Writes a new key down; returns its secret."""
    known = read_keys(path) if Path(path).exists() else {}
    if any(key.name == name for key in known.values()):
        raise OwlError(f"{path} has a key called {name!r} already")
    secret, key = new_key(name, **limits)
    with open(path, "a") as file:
        file.write(json.dumps(key.model_dump(exclude_none=True)) + "\n")
    Path(path).chmod(0o600)
    return secret


class Budgets:
    """What keys have left to spend: for each unit a bucket that holds a minute's worth, and fills within a minute."""

    def __init__(self) -> None:
        self.left: dict[tuple[str, str], tuple[float, float]] = {}
        """(key, unit) → what was left, and when."""

    def spend(self, key: Key, amounts: dict[str, int], now: float | None = None) -> tuple[str, float] | None:
        """Takes the amounts, or nothing: then returns the unit there is too little of, and in how many seconds there
        is enough (infinite for more than a minute's worth)."""
        now = time.monotonic() if now is None else now
        taken = {}
        for unit, amount in amounts.items():
            limit = getattr(key, f"{unit}_a_minute")
            if limit is None or not amount:
                continue
            left, then = self.left.get((key.name, unit), (float(limit), now))
            left = min(limit, left + (now - then) * limit / 60)
            if left < amount:
                return unit, (amount - left) * 60 / limit if amount <= limit else float("inf")
            taken[key.name, unit] = (left - amount, now)
        self.left |= taken
        return None
