"""An endpoint under load while its replicas are killed and replaced: every request ends, in a right answer, a clean
error or a refusal. How long: OWL_CHAOS_SECONDS, 90 unless told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections import Counter

import aiohttp
import psutil
import pytest
from ray import serve
from ray.serve.context import _get_global_client

from jobs.bench_serving import Load, ask, body_of
from pipelines.serving.keys import new_key
from pipelines.serving.options import Room, Serving
from pipelines.serving.serve import QUIET, build, running

pytestmark = pytest.mark.slow
SECRET, KEY = new_key("chaos")
SECONDS = float(os.environ.get("OWL_CHAOS_SECONDS", "90"))
SETTINGS = Serving(
    port=0,
    room=Room(tokens=8192, requests=8, queue=24, pictures=32),
    min_replicas=2,
    max_replicas=2,
    cpus_per_replica=0.5,
    drain_seconds=30,
)


def processes(name: str) -> list[int]:
    """Of a deployment's living replicas, among the processes of this test's own Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if f"ServeReplica:owl:{name}" in "".join(process.cmdline()[:1]):
                found.append(process.pid)
    return found


def ready() -> list[int]:
    """The engine replicas that have started, as Serve knows."""
    applications = _get_global_client().get_serve_details()["applications"]
    engine = applications.get("owl", {}).get("deployments", {}).get("Engine", {"replicas": []})
    return [replica["pid"] for replica in engine["replicas"] if replica["state"] == "RUNNING"]


async def killing(until: float, done: Counter) -> None:
    """Kills an engine replica every few seconds, as soon as two are ready: Serve gives an upgrade up whose new replicas
    die while they start."""
    while time.monotonic() < until:
        await asyncio.sleep(2)
        pids = await asyncio.to_thread(ready)
        if len(pids) >= 2:
            with contextlib.suppress(ProcessLookupError):
                os.kill(random.choice(pids), signal.SIGKILL)
                done["replicas killed"] += 1


async def upgrading(model: str, at: float, done: Counter) -> None:
    """Deploys the same model with other settings, under the same name."""
    await asyncio.sleep(max(0.0, at - time.monotonic()))
    changed = SETTINGS.model_copy(update={"longest": 512})
    app = build(model, changed, KEY)
    await asyncio.to_thread(serve.run, app, name="owl", route_prefix="/", logging_config=QUIET)
    done["upgrades"] += 1


async def rude(session: aiohttp.ClientSession, load: Load, body: dict) -> None:
    """A client that leaves in the midst."""
    headers = {"authorization": f"Bearer {load.key}"}
    try:
        async with session.post(f"{load.url}/chat/completions", json=body, headers=headers) as reply:
            await reply.content.readline()
    except aiohttp.ClientError:
        pass


async def slow_reader(session: aiohttp.ClientSession, load: Load, body: dict) -> None:
    headers = {"authorization": f"Bearer {load.key}"}
    try:
        async with session.post(f"{load.url}/chat/completions", json=body, headers=headers) as reply:
            while await reply.content.read(64):
                await asyncio.sleep(0.1)
    except aiohttp.ClientError:
        pass


async def storm(model: str, address: str, seconds: float) -> tuple[Counter, list[str], list[int]]:
    """What happened, what was wrong, and the gateway's memory over time."""
    load = Load(f"{address}/v1", SECRET, "owl", rate=3, requests=0, pictures=1, side=40, words=12, tokens=24)
    bodies = [body_of(load, number) for number in range(12)]
    found, wrong, memory = Counter[str](), [], []
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        expected = [(await ask(session, load, body)).text for body in bodies]
        assert all(expected)
        gateway = psutil.Process((await asyncio.to_thread(processes, "Gateway"))[0])

        async def one(number: int) -> None:
            outcome = await ask(session, load, bodies[number], seconds=120)
            found[outcome.end] += 1
            if outcome.end == "answer" and outcome.text != expected[number]:
                wrong.append(f"{number}: {outcome.text!r} for {expected[number]!r}")

        until = time.monotonic() + seconds
        beside = [
            asyncio.create_task(killing(until - 5, found)),
            asyncio.create_task(upgrading(model, until - seconds / 2, found)),
        ]
        tasks, draw = [], random.Random(0)
        while time.monotonic() < until:
            number = draw.randrange(len(bodies))
            kind = draw.random()
            if kind < 0.1:
                tasks.append(asyncio.create_task(rude(session, load, bodies[number])))
                found["left by us"] += 1
            elif kind < 0.15:
                tasks.append(asyncio.create_task(slow_reader(session, load, bodies[number])))
                found["read slowly"] += 1
            else:
                tasks.append(asyncio.create_task(one(number)))
            await asyncio.sleep(draw.expovariate(load.rate))
            if len(tasks) % 20 == 0 and gateway.is_running():
                memory.append(gateway.memory_info().rss)
        await asyncio.wait_for(asyncio.gather(*tasks, *beside), 180)
        last = [await ask(session, load, body) for body in bodies]
        assert [one.text for one in last] == expected
    return found, wrong, memory


def test_every_request_ends_while_replicas_die_and_are_replaced(cluster, model_folder):
    with running(model_folder, SETTINGS, KEY) as address:
        found, wrong, memory = asyncio.run(storm(model_folder, address, SECONDS))
    print(json.dumps({"found": dict(found), "memory MB": [m >> 20 for m in memory]}))
    assert wrong == []
    assert found["hangs"] == 0
    assert found["replicas killed"] >= SECONDS / 30
    assert found["upgrades"] == 1
    assert found["answer"] > sum(found[end] for end in found if end.startswith("refused"))
    assert set(found) <= {"left by us", "read slowly", "replicas killed", "upgrades", *ENDS, *REFUSED}


ENDS = ("answer", "error event", "hangs")
REFUSED = ("refused 429", "refused 503")
