"""Clients' pictures are decoded in processes of their own, which may take so much memory and time and no more.

A decoder is where hostile input does harm: what it breaks here is a process that holds nothing, writes no file, and is
replaced. What comes back from it are numbers of a known count, or one of a few refusals; it could not hand over more if
it tried. No torch is loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import struct
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from typing import Any, BinaryIO

import numpy as np

from owl_model.images import ImageError, decode, open_header, to_pixels

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_SIDE = 16_384
MIN_SIDE = 2
MAX_RATIO = 200
REFUSALS = (
    f"a picture cannot be decoded; {', '.join(FORMATS)} are",
    "a picture has more pixels than are taken",
    f"a picture's sides must be of {MIN_SIDE} to {MAX_SIDE} pixels",
    f"a picture's longer side must be at most {MAX_RATIO} times the shorter",
    "a picture must have one frame",
)
BROKEN, TOO_LARGE, SIDES, RATIO, FRAMES = range(len(REFUSALS))
HEAD = struct.Struct("<q")
"""Before a picture its bytes; before an answer 0, or a refusal as a negative number."""


class Undecodable(ValueError):
    """What may be told of a picture that is refused."""


# --- in the process --------------------------------------------------------------------------------------------------


def decoded(data: bytes, max_pixels: int, **fit: Any) -> np.ndarray | int:
    """[3, S, S] float32 as images.to_pixels with ``fit`` makes it, or which of REFUSALS."""
    try:
        header = open_header(data, max_pixels, FORMATS)
        width, height = header.size
        if not MIN_SIDE <= min(width, height) <= max(width, height) <= MAX_SIDE:
            return SIDES
        if max(width, height) > MAX_RATIO * min(width, height):
            return RATIO
        if getattr(header, "is_animated", False):
            return FRAMES
        return to_pixels(decode(header), **fit)
    except ImageError as error:
        return TOO_LARGE if error.reason == "image_bomb" else BROKEN
    except Exception:  # whatever a decoder may raise, out of memory among it
        return BROKEN


def limit(megabytes: int) -> None:
    """Of memory, over what the process has now; no file is written, and no core."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    for what, most in (
        (resource.RLIMIT_AS, now + megabytes * 2**20),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def work(options: dict[str, Any], come: BinaryIO, go: BinaryIO) -> None:
    """Pictures from one pipe, answers into another, until the first ends."""
    megabytes = options.pop("megabytes")
    decoded(b"", **options)  # loads what decoders there are
    limit(megabytes)
    while len(head := come.read(HEAD.size)) == HEAD.size:
        found = decoded(come.read(HEAD.unpack(head)[0]), **options)
        go.write(HEAD.pack(-1 - found) if isinstance(found, int) else HEAD.pack(0) + found.tobytes())
        go.flush()


# --- in the gateway --------------------------------------------------------------------------------------------------


class Decoders:
    """A few such processes, each with one picture at a time."""

    def __init__(self, processor: Any, processes: int = 1, megabytes: int = 768, max_pixels: int = 25_000_000):
        """``processor`` is an OwlImageProcessor."""
        self.side = processor.image_size
        self.options = {
            "megabytes": megabytes,
            "max_pixels": max_pixels,
            "side": self.side,
            "mean": list(processor.image_mean),
            "std": list(processor.image_std),
            "resample": int(processor.resample),
            "fit": processor.fit,
        }
        self.places = asyncio.Semaphore(processes)
        self.idle: list[Process] = []
        self.all: set[Process] = set()

    async def start(self) -> None:
        """One process before the first picture comes."""
        if not self.idle:
            self.idle.append(await self.new())

    async def new(self) -> Process:
        environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG") if name in os.environ}
        command = [sys.executable, "-m", "pipelines.serving.decoding", json.dumps(self.options)]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment
        )
        self.all.add(process)
        return process

    async def pixels(self, data: bytes, seconds: float = 10) -> np.ndarray:
        """Encoded bytes → [3, S, S] float32, as training prepares them. Raises Undecodable."""
        async with self.places:
            process = self.idle.pop() if self.idle else await self.new()
            if process.returncode is not None:  # it ended while it had nothing to do
                self.end(process)
                process = await self.new()
            try:
                found = await asyncio.wait_for(self.ask(process, data), seconds)
            except (OSError, asyncio.IncompleteReadError, TimeoutError):
                self.end(process)
                raise Undecodable(REFUSALS[BROKEN]) from None
            except BaseException:  # its asker has left; what it would still say must reach nobody else
                self.end(process)
                raise
            self.idle.append(process)
        if isinstance(found, int):
            raise Undecodable(REFUSALS[found])
        return found

    async def ask(self, process: Process, data: bytes) -> np.ndarray | int:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(HEAD.pack(len(data)) + data)
        await process.stdin.drain()
        refusal = HEAD.unpack(await process.stdout.readexactly(HEAD.size))[0]
        if refusal:
            return -1 - refusal if -len(REFUSALS) <= refusal < 0 else BROKEN
        raw = await process.stdout.readexactly(12 * self.side**2)
        return np.frombuffer(raw, dtype=np.float32).reshape(3, self.side, self.side).copy()

    def end(self, process: Process) -> None:
        self.all.discard(process)
        with contextlib.suppress(ProcessLookupError):
            process.kill()

    async def close(self) -> None:
        for process in list(self.all):
            self.end(process)
            await process.wait()


if __name__ == "__main__":
    work(json.loads(sys.argv[1]), sys.stdin.buffer, sys.stdout.buffer)
