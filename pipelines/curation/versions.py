"""A curated dataset's versions, and the lock by which one run at a time writes it.

versions/0001.json is the manifest of version 1, and so on; manifest.json is a copy of the last one. A version is there
as soon as its file is, and that file can be created once. What a version holds stays as it is: later runs add shards,
and never move a verdict on shards that were there before. So FOLDER@1 is still what it was when FOLDER@2 is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from pipelines import storage
from pipelines.curation import ledger
from pipelines.settings import OwlError

# --- versions --------------------------------------------------------------------------------------------------------


def publish(output: str, manifest: dict[str, Any], by: str, lock: Lock) -> dict[str, Any]:
    """Makes ``manifest`` the dataset's next version; ``by`` is the verb that made it. Raises OwlError where another run
    was quicker."""
    lock.refuse_if_lost()
    number, now = newest(output) + 1, datetime.now(UTC).isoformat(timespec="seconds")
    manifest = {"version": number, "made": now, "by": by} | manifest
    if not storage.create(ledger.version_path(output, number), json.dumps(manifest, indent=1).encode()):
        raise OwlError(f"another run made version {number} of {output} in the meantime")
    storage.write_json(f"{output}/manifest.json", manifest)
    return manifest


def newest(output: str) -> int:
    """The number of the last version; 0 where there is none."""
    there = storage.listing(f"{output}/versions", ".json")
    return int(storage.name_of(there[-1]).removesuffix(".json")) if there else 0


def current(output: str) -> dict[str, Any] | None:
    """The manifest of the last version; None where there is none yet. Where a run was killed between a version and its
    copy, the copy is made."""
    number = newest(output)
    if number == 0:
        return None
    manifest = storage.read_json(ledger.version_path(output, number))
    copy = f"{output}/manifest.json"
    if not storage.exists(copy) or storage.read_json(copy)["version"] != number:
        storage.write_json(copy, manifest)
    return manifest


def history(output: str) -> list[dict[str, Any]]:
    """Each version's number, time, verb and counts, oldest first. Raises OwlError where there is no dataset."""
    ledger.manifest_of(output)
    told, before = [], 0
    for path in storage.listing(f"{output}/versions", ".json"):
        manifest = storage.read_json(path)
        entry = {name: manifest[name] for name in ("version", "made", "by", "in", "kept")}
        told.append({**entry, "shards": len(manifest["shards"]), "more": manifest["kept"] - before})
        before = manifest["kept"]
    return told


def roll_back(output: str, to: int) -> dict[str, Any]:
    """Makes a new version that holds what version ``to`` held. Raw shards that came later are withdrawn: no run takes
    them again, and rolling back to a version that had them brings them back. Raises OwlError where there is no such
    version, or where its verdicts were moved since."""
    with writing(output) as lock:
        now = ledger.manifest_of(output)
        then = ledger.manifest_of(f"{output}@{to}")
        if moved := [told for told in history(output)[to:] if told["by"] in MOVES_VERDICTS]:
            raise OwlError(
                f"version {to} of {output} is no longer there: {moved[-1]['by']} moved its verdicts in version "
                f"{moved[-1]['version']}"
            )
        held = {entry["shard"] for entry in then["shards"]}
        ever = {entry["shard"] for entry in now["shards"]} | set(now["withdrawn"])
        same = {name: then[name] for name in then if name not in ("version", "made", "by", "withdrawn")}
        return publish(output, {**same, "withdrawn": sorted(ever - held)}, f"rollback to {to}", lock)


MOVES_VERDICTS = ("rethreshold", "decontaminate")
"""Verbs that change the ledgers and selections of shards that earlier versions hold."""


# --- the lock --------------------------------------------------------------------------------------------------------

BEAT = 10.0
DEAD = 60.0
"""A run shows every BEAT seconds that it is alive, and counts as dead when it did not for DEAD seconds."""


class Lock:
    """The right to write a dataset: lock/N.json, with the highest N of all. No clocks are compared: whoever waits sees
    for himself whether the file changes."""

    def __init__(self, output: str, path: str):
        self.output, self.path, self.token = output, path, uuid.uuid4().hex
        self.beats, self.lost, self.ended = 0, False, threading.Event()

    def content(self) -> bytes:
        who = {"token": self.token, "machine": socket.gethostname(), "pid": os.getpid(), "kernel": kernel()}
        return json.dumps({**who, "beats": self.beats}).encode()

    def keep(self, beat: float) -> None:
        """Shows that this run is alive until it ends, or until another has taken over."""
        while not self.ended.wait(beat):
            with contextlib.suppress(OSError):  # storage out of reach for a moment: the next beat will tell
                if holder(self.output)[0] != self.path or (read(self.path) or {}).get("token") != self.token:
                    self.lost = True
                    return
                self.beats += 1
                storage.write_bytes(self.path, self.content())

    def refuse_if_lost(self) -> None:
        if self.lost:
            raise OwlError(f"another run took over {self.output}, since this one gave no sign of life for long")


@contextlib.contextmanager
def writing(output: str, beat: float = BEAT, dead: float = DEAD) -> Iterator[Lock]:
    """Holds the lock of a dataset for as long as the block lasts. Raises OwlError where another run, which is alive,
    has it; that of a dead run is taken over: at once where it died on this machine, else after ``dead`` seconds."""
    lock = acquire(output, dead)
    keeper = threading.Thread(target=lock.keep, args=(beat,), daemon=True)
    keeper.start()
    try:
        yield lock
    finally:
        lock.ended.set()
        keeper.join()
        if not lock.lost:
            storage.remove(lock.path)


def acquire(output: str, dead: float) -> Lock:
    path, number = holder(output)
    if path and (seen := read(path)):
        refuse_alive(output, path, seen, dead)
    lock = Lock(output, f"{output}/lock/{number + 1:06d}.json")
    if not storage.create(lock.path, lock.content()):
        raise OwlError(f"another run began to write {output} at the same moment")
    for old in storage.listing(f"{output}/lock", ".json"):
        if old < lock.path:
            storage.remove(old)
    return lock


def refuse_alive(output: str, path: str, seen: dict, dead: float) -> None:
    """Returns when the lock's holder is dead. Raises OwlError as soon as it is seen to be alive."""
    if seen["kernel"] and seen["kernel"] == kernel() and not runs(seen["pid"]):
        return
    until = time.monotonic() + dead
    while time.monotonic() < until:
        time.sleep(min(1.0, dead / 10))
        now = read(path)
        if now is None:
            return
        if now != seen:
            where = f"process {seen['pid']} on {seen['machine']}"
            raise OwlError(f"another run is writing {output} ({where}); wait for its end, or stop it")


def holder(output: str) -> tuple[str, int]:
    """The highest lock file and its number; ("", 0) where there is none."""
    there = storage.listing(f"{output}/lock", ".json")
    return (there[-1], int(storage.name_of(there[-1]).removesuffix(".json"))) if there else ("", 0)


def read(path: str) -> dict | None:
    try:
        return storage.read_json(path)
    except FileNotFoundError:
        return None


def kernel() -> str:
    """What process numbers are counted by: this boot and this container; empty where the system does not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
