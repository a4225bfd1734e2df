"""Two thousand requests that mean harm: each refused with the right status, and nothing breaks or grows."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import statistics
import time
from collections import Counter
from urllib.parse import urlsplit

import openai
import psutil
import pytest
from endpoint import alone, shown
from hostile_requests import png_of, requests

from pipelines.serving.keys import new_key
from pipelines.serving.options import Media, Room, Serving

SECRET, KEY = new_key("hostile")
SETTINGS = Serving(
    room=Room(tokens=8192, requests=8, pictures=16), media=Media(hosts=["pictures.example", "localhost", "127.0.0.1"])
)


def sent(address: str, request) -> tuple[int, bytes]:
    """Status and body, of a connection of its own; http.client sends what it is told."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    try:
        connection.putrequest(request.method, request.path, skip_host=False)
        for name, value in {"authorization": f"Bearer {SECRET}", **request.headers}.items():
            connection.putheader(name, value.encode("latin-1"))
        connection.putheader("content-length", str(len(request.body)))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all was sent: it is answered
            connection.endheaders(request.body)
        reply, body = connection.getresponse(), b""
        with contextlib.suppress(ConnectionResetError):
            body = reply.read()
        return reply.status, body
    finally:
        connection.close()


def run(model_folder: str, count: int) -> dict:
    """Sends them, and returns what came of it."""
    process = psutil.Process(os.getpid())
    wrong, slow, kinds = [], [], Counter()
    with alone(model_folder, SETTINGS, {KEY.sha256: KEY}) as (address, engine):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=SECRET, max_retries=0)
        fine = {"model": "owl", "messages": shown(png_of(40, 40, 40)), "max_tokens": 4, "temperature": 0}
        before = client.chat.completions.create(**fine).choices[0].message.content
        for request in requests(min(count // 2, 200), seed=1):
            sent(address, request)  # what is loaded once is no growth
        memory = process.memory_info().rss
        for request in requests(count):
            began = time.perf_counter()
            try:
                status, body = sent(address, request)
            except OSError as error:
                wrong.append((request.kind, f"no answer: {error!r}", request.body[:200]))
                continue
            slow.append((time.perf_counter() - began, request.kind))
            kinds[request.kind] += 1
            if status not in request.right:
                wrong.append((request.kind, status, body[:300], request.path, request.body[:300]))
            elif status >= 400 and body.startswith(b"{"):
                assert set(json.loads(body)) == {"error"}
        grown = process.memory_info().rss - memory
        assert client.chat.completions.create(**fine).choices[0].message.content == before
        assert engine.asked == 0
    times = sorted(seconds for seconds, _ in slow)
    return {
        "requests": count,
        "wrong": wrong,
        "grown": grown,
        "median ms": 1000 * statistics.median(times),
        "p99 ms": 1000 * times[int(0.99 * len(times))],
        "slowest": [(round(1000 * s), kind) for s, kind in sorted(slow, reverse=True)[:8]],
        "kinds": dict(kinds),
    }


def test_some_of_them_are_refused(model_folder):
    found = run(model_folder, 60)
    assert found["wrong"] == []
    assert found["grown"] < 50 << 20


@pytest.mark.slow
def test_two_thousand_of_them_are_refused(model_folder):
    found = run(model_folder, 2000)
    print(json.dumps({name: value for name, value in found.items() if name != "wrong"}, indent=1))
    assert found["wrong"] == []
    assert found["grown"] < 50 << 20
