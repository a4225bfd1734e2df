"""Load for an OpenAI-compatible endpoint: requests arrive by the clock, whether or not those before are answered.

An open loop: a closed one (so many clients, each waiting for its answer) asks less where the endpoint is slow, and
hides its queue so. Arrivals are Poisson's; what is reported is what others report: time to first token (TTFT), time per
later token (TPOT), the whole (E2EL), throughput, and goodput, the share of requests within both limits.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

from pipelines.settings import OwlError


@dataclass
class Load:
    url: str
    """As OpenAI's clients take it, with its /v1."""
    key: str
    model: str
    rate: float
    """Requests a second."""
    requests: int
    pictures: int = 1
    side: int = 224
    """Of pictures, in pixels; every request shows others, unless ``repeat``."""
    repeat: bool = False
    words: int = 50
    tokens: int = 64
    """Of an answer, which never ends earlier."""
    seed: int = 0


@dataclass
class Outcome:
    """What came of one request."""

    end: str = "hangs"
    """"answer", "refused NNN", "error event", "cut off", or "hangs"."""
    first: float | None = None
    """Seconds to the first token."""
    whole: float = 0.0
    tokens: int = 0
    text: str = ""
    gaps: list[float] = field(default_factory=list)


def body_of(load: Load, number: int) -> dict[str, Any]:
    draw = random.Random(load.seed * 1_000_003 + number)
    parts: list[dict[str, Any]] = []
    for picture in range(load.pictures):
        noise = np.random.default_rng((load.seed, 0 if load.repeat else number, picture)).integers(0, 255, (16, 16, 3))
        image = Image.fromarray(noise.astype(np.uint8)).resize((load.side, load.side))
        file = io.BytesIO()
        image.save(file, "JPEG")
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    words = " ".join(
        draw.choices(("red", "blue", "circle", "square", "the", "is", "where", "left", "of"), k=load.words)
    )
    parts.append({"type": "text", "text": words})
    asked = {"model": load.model, "messages": [{"role": "user", "content": parts}], "max_tokens": load.tokens}
    return asked | {"temperature": 0, "stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}


async def ask(session: aiohttp.ClientSession, load: Load, body: dict[str, Any], seconds: float = 300) -> Outcome:
    """One streamed request, and what came of it; whatever happens, within so many seconds."""
    outcome, began = Outcome(), time.monotonic()
    try:
        async with asyncio.timeout(seconds):
            headers = {"authorization": f"Bearer {load.key}"}
            async with session.post(f"{load.url}/chat/completions", json=body, headers=headers) as reply:
                if reply.status != 200:
                    outcome.end = f"refused {reply.status}"
                    return outcome
                await read(reply, outcome, began)
    except TimeoutError:
        outcome.end = "hangs"
    except aiohttp.ClientError:
        outcome.end = "cut off"
    finally:
        outcome.whole = time.monotonic() - began
    return outcome


async def read(reply: aiohttp.ClientResponse, outcome: Outcome, began: float) -> None:
    last = began
    outcome.end = "cut off"
    async for line in reply.content:
        if not line.startswith(b"data: "):
            continue
        now = time.monotonic()
        if line.strip() == b"data: [DONE]":
            outcome.end = "answer"
            return
        told = json.loads(line[6:])
        if "error" in told:
            outcome.end = "error event"
            return
        if told.get("usage"):
            outcome.tokens = told["usage"]["completion_tokens"]
        if told["choices"] and (piece := told["choices"][0]["delta"].get("content")):
            outcome.text += piece
            if outcome.first is None:
                outcome.first = now - began
            else:
                outcome.gaps.append(now - last)
            last = now


async def run(load: Load) -> list[Outcome]:
    """All requests, each at its time."""
    draw = random.Random(load.seed)
    bodies = [body_of(load, number) for number in range(load.requests)]
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        tasks = []
        due = time.monotonic()
        for body in bodies:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.append(asyncio.create_task(ask(session, load, body)))
            due += draw.expovariate(load.rate)
        return list(await asyncio.gather(*tasks))


def measure(load: Load, ttft: float, tpot: float) -> dict[str, Any]:
    """One run's figures; ``ttft`` and ``tpot`` are the limits of goodput, in seconds."""
    began = time.monotonic()
    outcomes = asyncio.run(run(load))
    seconds = time.monotonic() - began
    ends = dict(Counter(one.end for one in outcomes))
    answered = [one for one in outcomes if one.end == "answer" and one.first is not None]
    if not answered:
        raise OwlError(f"{load.url} answered none of {load.requests} requests: {ends}")
    each = [(one.whole - (one.first or 0)) / max(1, one.tokens - 1) for one in answered]
    good = sum((one.first or 0) <= ttft and time_each <= tpot for one, time_each in zip(answered, each, strict=True))
    return {
        "rate": load.rate,
        "requests": load.requests,
        "pictures": load.pictures,
        "side": load.side,
        "ends": ends,
        "TTFT ms": percentiles([one.first or 0 for one in answered]),
        "TPOT ms": percentiles(each),
        "E2EL ms": percentiles([one.whole for one in answered]),
        "requests a second": round(len(answered) / seconds, 3),
        "tokens a second": round(sum(one.tokens for one in answered) / seconds, 1),
        "goodput": round(good / len(outcomes), 4),
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50, p90 and p99, in milliseconds."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    return {f"p{p}": round(1000 * ordered[min(len(ordered) - 1, p * len(ordered) // 100)], 2) for p in (50, 90, 99)}
