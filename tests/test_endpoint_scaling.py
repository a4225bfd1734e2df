"""An endpoint's replicas follow its load: 1 → 3 → 0 → 1."""

from __future__ import annotations

import asyncio
import json
import time

import aiohttp
import pytest
from test_endpoint_chaos import processes

from jobs.bench_serving import Load, ask, body_of
from pipelines.serving.keys import new_key
from pipelines.serving.options import Room, Serving
from pipelines.serving.serve import running

pytestmark = pytest.mark.slow
SECRET, KEY = new_key("scaling")
SETTINGS = Serving(
    port=0,
    room=Room(tokens=8192, requests=8, queue=64, pictures=32),
    min_replicas=0,
    max_replicas=3,
    target_ongoing=2,
    upscale_seconds=2,
    downscale_seconds=4,
    cpus_per_replica=0.5,
)


async def follow(address: str) -> list[tuple[float, str, int]]:
    """(seconds, what is asked, replicas) as they change."""
    load = Load(address, SECRET, "owl", rate=0, requests=0, pictures=1, side=40, words=12, tokens=100)
    began, seen = time.monotonic(), []
    phase = "one"

    async def watch() -> None:
        while True:
            now = len(await asyncio.to_thread(processes, "Engine"))
            if not seen or seen[-1][1:] != (phase, now):
                seen.append((round(time.monotonic() - began, 1), phase, now))
            await asyncio.sleep(0.5)

    async def until(count: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while seen[-1][2] != count:
            assert time.monotonic() < deadline, f"not {count} replicas: {seen}"
            await asyncio.sleep(0.2)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        watching = asyncio.create_task(watch())
        assert (await ask(session, load, body_of(load, 0))).end == "answer"
        await until(1, 60)
        phase = "many"
        stop = asyncio.Event()

        async def client(number: int) -> None:
            while not stop.is_set():
                assert (await ask(session, load, body_of(load, number))).end == "answer"

        clients = [asyncio.create_task(client(number)) for number in range(12)]
        await until(3, 120)
        stop.set()
        await asyncio.gather(*clients)
        phase = "none"
        await until(0, 120)
        told = {"authorization": f"Bearer {SECRET}"}
        for path in ("ready", "metrics", "v1/models"):  # none of these wakes it
            async with session.get(f"{address}/{path}", headers=told) as reply:
                assert reply.status == 200
        await asyncio.sleep(5)
        assert seen[-1][2] == 0
        phase = "one again"
        began_again = time.monotonic()
        outcome = await ask(session, load, body_of(load, 1))
        assert outcome.end == "answer"
        print(json.dumps({"first answer after none, s": round(time.monotonic() - began_again, 1)}))
        await until(1, 60)
        watching.cancel()
    return seen


def test_replicas_follow_the_load(cluster, model_folder):
    with running(model_folder, SETTINGS, KEY) as address:
        seen = asyncio.run(follow(address))
    print(json.dumps(seen))
    counts = [count for _, _, count in seen]
    assert max(counts) == 3
    assert 0 in counts[counts.index(3) :]
    assert counts[-1] == 1
