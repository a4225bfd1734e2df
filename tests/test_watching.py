"""What an operator sees, in a real browser, while jobs run on a cluster of this machine: data in every panel of every
dashboard, Ray's dashboard, a report. With OWL_PICTURES=docs/pictures the pictures of docs/operations.md are taken."""

from __future__ import annotations

import base64
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from endpoint import png
from local_cluster import Cluster, deploy, the_way, write_raw
from openai import OpenAI

from jobs.demo import put_together
from jobs.recipes import load
from jobs.world.shards import World

WORLD = World(pairs=27000, instructions=300, texts=300, questions=60, shards=180, seed=3)
BOARDS = Path(__file__).parents[1] / "cluster/grafana"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("prometheus"), reason="Prometheus is not installed"),
]


def taken(page, name: str, whole: bool = False, after: float = 0) -> None:
    """A picture for the docs, where one is asked for, ``after`` seconds in which lines become longer."""
    if folder := os.environ.get("OWL_PICTURES"):
        page.wait_for_timeout(1000 * after)
        page.screenshot(path=f"{folder}/{name}.png", full_page=whole)


def every_panel_has_data(page, prometheus: str, board: str) -> None:
    page.goto("about:blank")
    page.goto(f"{prometheus}/user/board.html#board={board}&span=120")
    panels = len(json.loads((BOARDS / f"{board}.json").read_text())["panels"])
    page.wait_for_function(f"() => document.querySelectorAll('main section[data-state]').length === {panels}")
    try:
        page.wait_for_function("() => !document.querySelector('main section:not([data-state=data])')", timeout=180_000)
    except Exception:
        empty = page.locator("main section:not([data-state=data]) h2").all_inner_texts()
        raise AssertionError(f"{board} has no data in {empty}") from None


def asking(address: str, secret: str, until: Callable[[], bool]) -> None:
    """Some that come at once, again and again: with a picture and without, and one that is refused."""
    client = OpenAI(base_url=f"{address}/v1", api_key=secret, max_retries=0, timeout=120)
    picture = "data:image/png;base64," + base64.b64encode(png(1)).decode()
    parts = [{"type": "text", "text": "what color is the circle ?"}]
    contents = [parts, [{"type": "image_url", "image_url": {"url": picture}}, *parts]]

    def ask(number: int) -> None:
        messages = [{"role": "user", "content": contents[number % 2]}]
        for part in client.chat.completions.create(model="owl", messages=messages, max_tokens=16, stream=True):
            assert part.object == "chat.completion.chunk"

    with ThreadPoolExecutor(4) as pool:
        while not until():
            list(pool.map(ask, range(8)))


def test_every_panel_has_data_while_the_work_is_done(chromium, model_folder, tmp_path):
    raw = write_raw(tmp_path, WORLD)
    cluster = Cluster(tmp_path / "cluster")
    cluster.up()
    text = ("--out", f"{tmp_path}/curated/text", "--recipe", "demo_small", "--set", "deduplication=null")
    way = the_way(raw, tmp_path / "out", "")
    try:
        prometheus = cluster.watch()
        token = cluster.owl("cluster", "token").stdout.strip()
        context = chromium.new_context(viewport={"width": 1280, "height": 800}, device_scale_factor=1)
        context.add_cookies([{"name": "ray-authentication-token", "value": token, "url": cluster.address}])
        page = context.new_page()

        with ThreadPoolExecutor(1) as jobs:
            job = jobs.submit(cluster.submit, "--name", "pairs", *way["pairs"])
            page.goto(f"{cluster.address}/#/jobs")
            page.get_by_text("RUNNING").first.wait_for(timeout=120_000)
            taken(page, "ray-dashboard")
            every_panel_has_data(page, prometheus, "owl-curation")
            assert job.result()["kept"] > 26000
            taken(page, "board-curation", whole=True, after=10)
        page.goto(f"file://{tmp_path}/out/pairs/report.html")
        taken(page, "report-curation")

        cluster.owl("curate", f"{raw}/raw/text", *text)  # what the tokenizer learns from
        way = the_way(raw, tmp_path / "out", put_together(tmp_path, load("demo_small")))
        with ThreadPoolExecutor(1) as jobs:
            job = jobs.submit(cluster.submit, "--name", "stage1", *way["stage1"], "--set", "steps=200")
            every_panel_has_data(page, prometheus, "owl-training")
            assert job.result()["step"] == 200
            taken(page, "board-training", whole=True)
        page.goto(f"file://{tmp_path}/out/stage1/report.html")
        taken(page, "report-training")

        address, secret = deploy(cluster, tmp_path, model_folder, min_replicas=2, max_replicas=2)
        seen = threading.Event()
        with ThreadPoolExecutor(1) as jobs:
            load_ = jobs.submit(asking, address, secret, seen.is_set)
            try:
                for board in ("endpoint", "cluster"):
                    every_panel_has_data(page, prometheus, f"owl-{board}")
                    taken(page, f"board-{board}", whole=True, after=45)
            finally:
                seen.set()
            load_.result()
    finally:
        cluster.down()
