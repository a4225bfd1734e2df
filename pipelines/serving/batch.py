"""Requests from files, answers into files: OpenAI's batch format, without an endpoint, through Ray Data.

    {"custom_id", "method": "POST", "url": "/v1/chat/completions", "body"}
    → {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}

Each line has its answer or its refusal, as the endpoint would have given it.
"""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from typing import Any

import pyarrow as pa
import ray.data
from pydantic import ValidationError

from pipelines import storage
from pipelines.serving.api import ChatRequest, CompletionRequest, Refusal
from pipelines.serving.keys import OPEN
from pipelines.serving.options import Serving
from pipelines.serving.serve import open_engine, refuse_no_model
from pipelines.serving.shared import Shared
from pipelines.settings import OwlError

KINDS: dict[str, type[ChatRequest] | type[CompletionRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}


def answer_file(requests: str, out: str, model: str, settings: Serving, actors: int = 1) -> dict[str, int]:
    """Answers all lines of a file into another, in their order; returns how many ended with which status. Raises
    OwlError where the file holds no requests."""
    refuse_no_model(model)
    try:
        lines = [line for line in storage.read_bytes(requests).decode().splitlines() if line.strip()]
    except (FileNotFoundError, UnicodeDecodeError):
        raise OwlError(f"{requests} is no file of requests") from None
    if not lines:
        raise OwlError(f"{requests} holds no requests")
    table = pa.table({"number": range(len(lines)), "line": lines})
    batches = ray.data.from_arrow(table).map_batches(
        Answerer,
        fn_constructor_args=(model, settings.model_dump()),
        batch_size=4 * settings.room.requests,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=settings.cpus_per_replica,
        num_gpus=settings.gpus_per_replica,
    )
    told = sorted(batches.take_all(), key=lambda row: row["number"])
    storage.write_text(out, "".join(row["answer"] + "\n" for row in told))
    counts: dict[str, int] = {}
    for row in told:
        status = str(json.loads(row["answer"])["response"]["status_code"])
        counts[status] = counts.get(status, 0) + 1
    return counts


class Answerer:
    """An engine with its gateway, in one process of Ray Data's; it answers a batch's lines at once."""

    def __init__(self, model: str, settings: dict):
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.do(self.open(model, Serving(**settings)))

    def do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def open(self, model: str, settings: Serving) -> None:
        from pipelines.serving.gateway import Gateway
        from pipelines.serving.meters import Meters
        from pipelines.serving.models import Models

        shared = Shared(settings.media)
        engine = open_engine(model, settings, shared)
        self.gateway = Gateway(Models(model, settings), settings, engine, shared, None, Meters("batch"))
        self.places = asyncio.Semaphore(settings.room.requests)

    def __call__(self, batch: pa.Table) -> pa.Table:
        answers = self.do(self.all_of(batch["line"].to_pylist()))
        return pa.table({"number": batch["number"], "answer": [json.dumps(answer) for answer in answers]})

    async def all_of(self, lines: list[str]) -> list[dict]:
        return list(await asyncio.gather(*(self.one(line) for line in lines)))

    async def one(self, line: str) -> dict[str, Any]:
        name, custom = uuid.uuid4().hex, None
        try:
            told = json.loads(line)
            custom = told.get("custom_id")
            body = await self.answer(told, name)
            status = 200
        except Refusal as refusal:
            status, body = refusal.status, refusal.body
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            status, body = 400, Refusal(400, f"{place}: {first['msg']}", place).body
        except (ValueError, AttributeError):
            status, body = 400, Refusal(400, "the line is no JSON object").body
        response = {"status_code": status, "request_id": name, "body": body}
        return {"id": f"batch_req_{name}", "custom_id": custom, "response": response, "error": None}

    async def answer(self, told: dict, name: str) -> dict[str, Any]:
        kind = KINDS.get(told.get("url", ""))
        if kind is None or told.get("method") != "POST":
            raise Refusal(400, f"url: one of {', '.join(KINDS)} is meant, by POST", "url")
        request = kind.model_validate_json(json.dumps(told.get("body")))
        if request.stream:
            raise Refusal(400, "stream: a file is not streamed into", "stream")
        async with self.places:
            if isinstance(request, ChatRequest):
                work = await self.gateway.reader.chat(request, OPEN, name)
            else:
                work = await self.gateway.reader.complete(request, OPEN, name)
            return await self.gateway.whole(work)
