"""An endpoint's replicas follow its load: 1 → 3 → 0 → 1, as its processes and Prometheus tell."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from urllib.parse import urlencode
from urllib.request import urlopen

import aiohttp
import psutil
import pytest
from local_cluster import Cluster, deploy

from jobs.bench_serving import Load, ask, body_of

pytestmark = pytest.mark.slow
SETTINGS = {
    "room": {"tokens": 8192, "requests": 8, "queue": 64, "pictures": 32},
    "min_replicas": 0,
    "max_replicas": 3,
    "target_ongoing": 2,
    "upscale_seconds": 2,
    "downscale_seconds": 4,
    "cpus_per_replica": 0.5,
}
ENGINES = 'count(ray_serve_deployment_replica_healthy{deployment="Engine"} == 1) or vector(0)'


def engines(cluster: Cluster) -> list[psutil.Process]:
    return [process for process, _ in cluster.workers("ServeReplica:owl:Engine")]


async def follow(cluster: Cluster, address: str, secret: str) -> list[tuple[float, str, int]]:
    """(seconds, what is asked, replicas) as they change."""
    load = Load(f"{address}/v1", secret, "owl", rate=0, requests=0, pictures=1, side=40, words=12, tokens=100)
    began, seen = time.monotonic(), []
    phase = "one"

    async def watch() -> None:
        while True:
            now = len(await asyncio.to_thread(engines, cluster))
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
        told = {"authorization": f"Bearer {secret}"}
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


def told(prometheus: str, query: str, since: float) -> list[int]:
    """The values of a query since then, each as often as it changed."""
    asked = urlencode({"query": query, "start": since, "end": time.time(), "step": 2})
    with urlopen(f"{prometheus}/api/v1/query_range?{asked}") as answer:
        (series,) = json.load(answer)["data"]["result"]
    return [int(value) for value, _ in groupby(value for _, value in series["values"])]


def in_order(wanted: list[int], among: list[int]) -> bool:
    rest = iter(among)
    return all(value in rest for value in wanted)


@pytest.mark.skipif(not shutil.which("prometheus"), reason="Prometheus is not installed")
def test_replicas_follow_the_load(chromium, model_folder, tmp_path):
    cluster = Cluster(tmp_path / "cluster")
    cluster.up("--head-cpus", "0")
    try:
        prometheus, began = cluster.watch(), time.time()
        there = deploy(cluster, tmp_path, model_folder, **SETTINGS)
        with ThreadPoolExecutor(1) as apart:  # the browser's event loop is this thread's
            seen = apart.submit(asyncio.run, follow(cluster, *there)).result()
        print(json.dumps(seen))
        assert in_order([1, 3, 0, 1], [count for _, _, count in seen])
        time.sleep(15)  # until it has been scraped
        assert in_order([1, 3, 0, 1], told(prometheus, ENGINES, began))
        page = chromium.new_page(viewport={"width": 1280, "height": 800})
        page.goto(f"{prometheus}/user/board.html#board=owl-endpoint&span={round(time.time() - began)}")
        page.wait_for_function("() => document.querySelectorAll('main section[data-state=data]').length > 8")
        if folder := os.environ.get("OWL_PICTURES"):
            page.get_by_label("Replicas").first.screenshot(path=f"{folder}/scaling.png")
    finally:
        cluster.down()
