"""Clients' pictures are decoded in processes of their own, which may take so much memory and time and no more.

A decoder is where hostile input does harm: what it breaks here is a process that holds nothing, and that is replaced.
Nothing that a decoder said goes back to the client. No torch is loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from owl_model.images import ImageError, decode, open_header, to_pixels

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_SIDE = 16_384
MIN_SIDE = 2
MAX_RATIO = 200


class Undecodable(ValueError):
    """What may be told of a picture that is refused."""


def limit_process(megabytes: int) -> None:
    """Of address space, over what the process has now."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    limit = now + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def decoded(data: bytes, max_pixels: int, side: int, mean, std, resample: int, fit: str) -> np.ndarray | str:
    """[3, side, side], or why it is refused."""
    try:
        header = open_header(data, max_pixels, FORMATS)
        width, height = header.size
        if not MIN_SIDE <= min(width, height) <= max(width, height) <= MAX_SIDE:
            return f"a picture's sides must be of {MIN_SIDE} to {MAX_SIDE} pixels"
        if max(width, height) > MAX_RATIO * min(width, height):
            return f"a picture's longer side must be at most {MAX_RATIO} times the shorter"
        if getattr(header, "is_animated", False):
            return "a picture must have one frame"
        return to_pixels(decode(header), side, mean, std, resample, fit)
    except ImageError as error:
        return f"a picture has more than {max_pixels} pixels" if error.reason == "image_bomb" else BROKEN
    except Exception:  # whatever a decoder may raise, out of memory among it
        return BROKEN


BROKEN = f"a picture cannot be decoded; {', '.join(FORMATS)} are"


class Decoders:
    """A few such processes."""

    def __init__(self, processor: Any, processes: int = 1, megabytes: int = 768, max_pixels: int = 25_000_000):
        """``processor`` is an OwlImageProcessor."""
        self.options = (
            max_pixels,
            processor.image_size,
            tuple(processor.image_mean),
            tuple(processor.image_std),
            int(processor.resample),
            processor.fit,
        )
        self.processes, self.megabytes = processes, megabytes
        self.pool = self.new_pool()

    def new_pool(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self.processes, context, limit_process, (self.megabytes,))

    async def pixels(self, data: bytes, seconds: float = 10) -> np.ndarray:
        """Encoded bytes → [3, S, S] float32, as training prepares them. Raises Undecodable."""
        found: np.ndarray | str = BROKEN
        for _ in range(2):  # a process that another picture broke is no fault of this one
            pool = self.pool
            try:
                running = asyncio.get_running_loop().run_in_executor(pool, decoded, data, *self.options)
                found = await asyncio.wait_for(asyncio.shield(running), seconds)
                break
            except BrokenProcessPool:
                self.replace(pool)
            except TimeoutError:
                self.replace(pool)
                break
        if isinstance(found, str):
            raise Undecodable(found)
        return found

    def replace(self, broken: ProcessPoolExecutor) -> None:
        if self.pool is broken:
            self.pool = self.new_pool()
        self.end(broken)

    @staticmethod
    def end(pool: ProcessPoolExecutor) -> None:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            with contextlib.suppress(Exception):
                process.kill()

    def close(self) -> None:
        self.end(self.pool)
