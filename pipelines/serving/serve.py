"""A model folder behind OpenAI's API: an ingress that checks requests, and autoscaling engine replicas."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import socket
from collections.abc import AsyncIterator, Iterator

import ray
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from pipelines import storage
from pipelines.serving import api
from pipelines.serving.api import chained, until_stop
from pipelines.serving.media import MediaError, split_media
from pipelines.serving.room import Room
from pipelines.settings import OwlError, Settings

log = logging.getLogger(__name__)
CONTROLLER = "SERVE_CONTROLLER_ACTOR"
web = FastAPI(title="Owl", summary="A vision-language model behind OpenAI's API")


@web.exception_handler(RequestValidationError)
async def invalid(request: Request, problem: RequestValidationError) -> JSONResponse:
    first = problem.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    return JSONResponse(api.error(f"{place}: {first['msg']}", param=place or None), 400)


class Serving(Settings):
    """How a model is served."""

    name: str = "owl"
    """The model's name in requests."""
    host: str = "127.0.0.1"
    """Address to listen on; other machines reach it only if you change this."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    min_replicas: int = 1
    """Fewest engine replicas; 0 lets an idle endpoint sleep."""
    max_replicas: int = 1
    """Most engine replicas."""
    cpus_per_replica: float = 1
    """CPUs of a replica."""
    gpus_per_replica: float = 0
    """GPUs of a replica."""
    max_ongoing: int = 8
    """Requests that one replica works on at once."""
    room: Room = Room()
    """What a replica's engine holds at once."""
    max_queued: int = 64
    """Requests that may wait; more are answered 503 at once."""


def build(model: str, settings: Serving) -> serve.Application:
    """The Serve application. Raises OwlError where there is no model folder."""
    if not storage.exists(f"{model}/config.json"):
        raise OwlError(f"no model folder at {model!r}: it has no config.json")
    from pipelines.serving.engine import Engine  # brings torch, which settings need not wait for

    engine = Engine.options(  # type: ignore[attr-defined]
        max_ongoing_requests=settings.max_ongoing,
        max_queued_requests=settings.max_queued,
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "initial_replicas": max(1, settings.min_replicas),
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": max(1, settings.max_ongoing // 2),
        },
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
    ).bind(model, settings.room.model_dump())
    return Ingress.bind(engine, settings.name)  # type: ignore[attr-defined]


@contextlib.contextmanager
def running(model: str, settings: Serving) -> Iterator[str]:
    """Deploys, yields the endpoint's address, and takes it down. Raises OwlError where the port is taken, or where this
    Ray serves already: its port would stay what it is."""
    application = build(model, settings)
    if any(actor["name"] == CONTROLLER for actor in ray.util.list_named_actors(all_namespaces=True)):
        raise OwlError("Ray Serve runs on this cluster already; end it with `serve shutdown`, or use another cluster")
    port = free_port(settings.host, settings.port)
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(http_options={"host": settings.host, "port": port}, logging_config=quiet)
    serve.run(application, name=settings.name, route_prefix="/", logging_config=quiet)
    try:
        yield f"http://{settings.host}:{port}"
    finally:
        serve.shutdown()


def free_port(host: str, port: int) -> int:
    """The same port if nothing listens there, or a free one in place of 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as problem:
            raise OwlError(f"cannot listen on {host}:{port}: {problem.strerror}; choose another port") from None
        return probe.getsockname()[1]


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=256)
@serve.ingress(web)
class Ingress:
    def __init__(self, engine: DeploymentHandle, name: str):
        self.engine = engine.options(stream=True)
        self.name = name

    @web.get("/health")
    async def health(self) -> dict:
        return {"status": "ok"}

    @web.get("/v1/models")
    async def models(self) -> dict:
        return {"object": "list", "data": [{"id": self.name, "object": "model", "created": 0, "owned_by": "owl"}]}

    @web.post("/v1/chat/completions")
    async def chat(self, request: api.ChatRequest) -> Response:
        if request.model != self.name:
            message = f"there is no model {request.model!r} here; there is {self.name!r}"
            return JSONResponse(api.error(message, param="model"), 404)
        try:
            messages, pictures = split_media(request.messages)
        except MediaError as problem:
            return JSONResponse(api.error(str(problem), param="messages"), 400)
        options: dict = {"max_new_tokens": request.longest, "temperature": request.temperature, "top_p": request.top_p}
        options["seed"] = random.getrandbits(31) if request.seed is None else request.seed
        pieces = until_stop(self.engine.stream.remote(messages, pictures, options), request.stops)
        first = await anext(pieces)
        if "refused" in first:
            return JSONResponse(api.error(first["refused"], param="messages"), 400)
        request_id = api.completion_id()
        if request.stream:
            usage = bool(request.stream_options and request.stream_options.include_usage)
            return StreamingResponse(self.events(request_id, first, pieces, usage), media_type="text/event-stream")
        text, last = first.get("text", ""), first
        async for last in pieces:
            text += last.get("text", "")
        return JSONResponse(api.completion(request_id, self.name, text.strip(), last["usage"], last["finish"]))

    async def events(self, request_id: str, first: dict, pieces: AsyncIterator[dict], usage: bool):
        """Server-sent events of a streamed answer."""

        def event(value: dict) -> str:
            return f"data: {json.dumps(value)}\n\n"

        yield event(api.chunk(request_id, self.name, {"role": "assistant", "content": ""}))
        async for piece in chained(first, pieces):
            if "text" in piece:
                yield event(api.chunk(request_id, self.name, {"content": piece["text"]}))
                continue
            yield event(api.chunk(request_id, self.name, {}, piece["finish"]))
            if usage:
                yield event({**api.chunk(request_id, self.name, {}), "choices": [], "usage": piece["usage"]})
        yield "data: [DONE]\n\n"
