"""What the gateway itself costs, before an engine that answers at once; and what a picture costs that is asked about
again, before a real one.

    client → gateway → engine            in one process under uvicorn
    client → Serve's proxy → gateway replica → engine replica      on Ray Serve
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import aiohttp
from ray import serve

from jobs.bench_engines import Server, owl, spread, write_model
from jobs.bench_serving import Load, ask, body_of
from pipelines.serving.engine import Ask, Step
from pipelines.serving.options import Serving

WORD = 10


class Echo:
    """Answers at once, one word again and again."""

    async def submit(self, ask: Ask) -> AsyncGenerator[Step, None]:
        for number in range(ask.longest):
            yield Step([WORD], [], "length" if number == ask.longest - 1 else None)

    async def looked(self, ask: Ask, answer: list[int]) -> list:
        return []

    async def stats(self) -> dict[str, float]:
        return {}

    async def check(self) -> None: ...
    async def drain(self) -> None: ...
    def stop(self) -> None: ...


@serve.deployment
class EchoReplica(Echo):
    def __init__(self, model: str, settings: dict, shared: Any): ...

    async def submit(self, ask: Ask) -> AsyncGenerator[Step, None]:
        async for step in super().submit(Ask(*ask)):
            yield step


async def firsts(load: Load, clients: int, turns: int) -> list[float]:
    """Seconds to the first token, of ``clients`` that ask one question after another."""
    found: list[float] = []

    async def client(number: int) -> None:
        for turn in range(turns + 2):
            outcome = await ask(session, load, body_of(load, number * turns + turn))
            assert outcome.end == "answer", outcome.end
            assert outcome.first is not None
            if turn > 1:  # the first two warm up
                found.append(outcome.first)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(number) for number in range(clients)))
    return found


async def again(load: Load, pictures: int) -> tuple[float, float]:
    """Median seconds to the first token of a question about a new picture, and of the same asked again."""
    new: list[float] = []
    known: list[float] = []
    async with aiohttp.ClientSession() as session:
        for number in range(pictures + 1):
            for kind in (new, known):
                outcome = await ask(session, load, body_of(load, number))
                assert outcome.first is not None, outcome.end
                if number:
                    kind.append(outcome.first)
    return statistics.median(new), statistics.median(known)


@contextlib.contextmanager
def answering(name: str, command: list[str]) -> Iterator[str]:
    """A server's address, in a process of its own."""
    server = Server(name, command)
    try:
        server.wait()
        yield server.url
    finally:
        server.end()


def measure(folder: str, turns: int, pictures: int) -> Iterator[dict[str, Any]]:
    """Milliseconds to the first token."""
    from pipelines.serving.serve import running

    write_model(folder)
    settings = Serving(no_keys=True, port=0)
    bare = answering("the gateway", [sys.executable, "-m", "jobs.bench_gateway", folder, "PORT"])
    for way, opened in (("one process", bare), ("Ray Serve", running(folder, settings, None, EchoReplica))):
        with opened as url:
            for clients in (1, 16):
                load = Load(f"{url}/v1", "none", "owl", rate=0, requests=0, pictures=0, words=20, tokens=8)
                found = asyncio.run(firsts(load, clients, turns))
                yield {"gateway": way, "clients": clients, "TTFT ms": spread(found)}
    with answering("owl", owl(sys.executable, folder, "fp32", 4, 8192)) as url:
        load = Load(f"{url}/v1", "none", "owl", rate=0, requests=0, pictures=1, side=448, words=120, tokens=2)
        new, known = asyncio.run(again(load, pictures))
        yield {"TTFT ms of a new picture": round(1000 * new, 1), "asked about again": round(1000 * known, 1)}


def serve_echo(folder: str, port: int) -> None:
    import uvicorn

    from pipelines.serving.serve import open_gateway, uvicorn_config
    from pipelines.serving.shared import Shared

    settings = Serving(no_keys=True)
    web = open_gateway(folder, settings, Echo(), Shared(settings.media), None)
    uvicorn.Server(uvicorn_config(web, settings, port)).run()


if __name__ == "__main__":
    serve_echo(sys.argv[1], int(sys.argv[2]))
