"""A model folder → an OpenAI-compatible endpoint.

On Ray Serve: gateway replicas, which hold no weights, check requests, decode pictures and write; engine replicas, which
come and go with the load, compute; and one small process knows what all of them share. On one machine without Ray:
gateway and engine in one process under uvicorn. The gateway is the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import numpy as np
import ray
import uvicorn
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatus, ReplicaState
from safetensors import SafetensorError, safe_open

from pipelines import storage
from pipelines.serving.engine import Ask, Busy, Died, Engine, Step, Unfit
from pipelines.serving.keys import Key, read_keys
from pipelines.serving.meters import Meters
from pipelines.serving.options import Serving
from pipelines.serving.shared import Shared, There
from pipelines.settings import OwlError

log = logging.getLogger("owl.serving")
CONTROLLER = "SERVE_CONTROLLER_ACTOR"
QUIET = {"log_level": "WARNING", "enable_access_log": False}


# --- one process -----------------------------------------------------------------------------------------------------


def open_engine(model: str, settings: Serving, shared: Shared | There) -> Engine:
    """The engine, with a model folder in it, on a GPU where PyTorch finds one. Raises OwlError where a GPU, or vLLM, is
    asked for and not there."""
    import torch

    from owl_model.answering import load

    if settings.engine == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise OwlError("there is no vLLM in this environment; docs/serving.md says how it is installed")
        from owl_model import OwlProcessor
        from pipelines.serving.vllm.engine import Vllm

        return Vllm(model, OwlProcessor.from_pretrained(model).end_id, settings)
    from pipelines.serving.batching import Batching, aside, grammars_of

    if settings.gpus_per_replica and not torch.cuda.is_available():
        raise OwlError(f"serving.gpus_per_replica is {settings.gpus_per_replica:g}, and PyTorch finds no GPU here")
    owl, processor = aside(load, model)
    if settings.precision == "bf16":
        aside(owl.to, torch.bfloat16)
    return Batching(owl, processor.end_id, settings.room, grammars_of(processor, owl), shared)


def open_gateway(
    model: str,
    settings: Serving,
    engine: Engine,
    shared: Shared | There,
    keys: dict[str, Key] | None,
    proxied: bool = False,
) -> Any:
    """The ASGI application in front of an engine."""
    from pipelines.serving.gateway import Gateway
    from pipelines.serving.models import Models
    from pipelines.serving.web import application

    meters = Meters(f"{os.uname().nodename}-{os.getpid()}")
    return application(Gateway(Models(model, settings), settings, engine, shared, keys, meters), proxied)


def keys_of(settings: Serving, made: Key | None) -> dict[str, Key] | None:
    """Hash → key; ``made`` is the one key of an endpoint without a file of them. Raises OwlError."""
    if settings.no_keys:
        return None
    if settings.keys:
        return read_keys(settings.keys)
    if made is None:
        raise OwlError("an endpoint needs keys: a file of them (owl keys add NAME --file FILE), or no_keys=true")
    return {made.sha256: made}


async def alone(model: str, settings: Serving, made: Key | None, started: Callable[[str], None]) -> None:
    """Gateway and engine in this process, until it is told to stop; ``started`` is told the address."""
    refuse_no_model(model)
    if settings.engine_python:
        raise OwlError("engine_python is for replicas on Ray Serve; alone, start owl with that Python")
    keys = keys_of(settings, made)
    shared = Shared(settings.media)
    engine = open_engine(model, settings, shared)
    web = open_gateway(model, settings, engine, shared, keys)
    port = free_port(settings.host, settings.port)
    server = uvicorn.Server(uvicorn_config(web, settings, port))

    async def tell() -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        started(f"http://{settings.host}:{port}")

    telling = asyncio.create_task(tell())
    try:
        await server.serve()
        await engine.drain()
    finally:
        telling.cancel()
        engine.stop()


def uvicorn_config(web: Any, settings: Serving, port: int) -> uvicorn.Config:
    return uvicorn.Config(
        web,
        host=settings.host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        http="h11",  # refuses headers beyond 64 KB, which httptools takes
        timeout_graceful_shutdown=int(settings.drain_seconds),
    )


# --- Ray Serve -------------------------------------------------------------------------------------------------------


@serve.deployment
class EngineReplica:
    """An engine in a process of its own, with what Serve asks of a replica."""

    def __init__(self, model: str, settings: dict, shared: DeploymentHandle):
        self.engine = open_engine(model, Serving(**settings), There(shared))
        self.meters = Meters(serve.get_replica_context().replica_id.unique_id)

    async def submit(self, ask: Ask) -> AsyncGenerator[Step, None]:
        steps = self.engine.submit(Ask(*ask))
        try:
            async for step in steps:
                yield step
        finally:
            await steps.aclose()

    async def looked(self, ask: Ask, answer: list[int]) -> list[np.ndarray]:
        return await self.engine.looked(Ask(*ask), answer)

    async def check_health(self) -> None:
        self.meters.tell(await self.engine.stats())
        await self.engine.check()


class Replicas:
    """Engine replicas as one engine."""

    def __init__(self, handle: DeploymentHandle):
        self.handle, self.streams = handle, handle.options(stream=True)

    async def submit(self, ask: Ask) -> AsyncGenerator[Step, None]:
        steps = self.streams.submit.remote(ask)
        try:
            async for step in steps:
                yield step
        except (GeneratorExit, asyncio.CancelledError):
            with contextlib.suppress(Exception):  # whatever it failed of, it has ended
                steps.cancel()
            raise
        except (Busy, Unfit, Died) as problem:
            raise known_cause(problem) from None
        except BackPressureError:
            raise Busy("too many requests wait already") from None
        except (RayError, DeploymentUnavailableError) as problem:
            log.warning("%s: %s", ask.name, type(problem).__name__)
            raise Died("the engine replica went away") from None

    async def looked(self, ask: Ask, answer: list[int]) -> list[np.ndarray]:
        try:
            return await self.handle.looked.remote(ask, answer)
        except Unfit as problem:
            raise known_cause(problem) from None
        except (BackPressureError, RayError, DeploymentUnavailableError) as problem:
            raise Died(f"no engine replica could say: {type(problem).__name__}") from None

    async def stats(self) -> dict[str, float]:
        """Nothing: each replica tells Ray of itself. To ask one would wake an endpoint that sleeps."""
        return {}

    async def check(self) -> None:
        """Of what Serve knows, for the same reason; an endpoint that sleeps is ready."""
        status = await asyncio.to_thread(serve.status)
        engine = status.applications[self.handle.deployment_id.app_name].deployments[self.handle.deployment_name]
        if not engine.replica_states.get(ReplicaState.RUNNING) and engine.status != DeploymentStatus.HEALTHY:
            raise RuntimeError(f"no engine replica runs: {engine.status}")

    async def drain(self) -> None:
        """Serve drains replicas by itself."""

    def stop(self) -> None:
        """Serve ends replicas by itself."""


def known_cause(problem: Exception) -> Exception:
    """Ray wraps what a replica raised; its message is a whole traceback."""
    return getattr(problem, "cause", None) or problem


@serve.deployment
@serve.ingress()
class GatewayReplica:
    """Routes, keys, pictures and words, in front of the engine replicas."""

    def __init__(
        self,
        model: str,
        settings: dict,
        engine: DeploymentHandle,
        shared: DeploymentHandle,
        made: dict | None,
    ):
        chosen = Serving(**settings)
        keys = keys_of(chosen, Key(**made) if made else None)
        self.web = open_gateway(model, chosen, Replicas(engine), There(shared), keys, proxied=True)

    def __serve_build_asgi_app__(self) -> Any:
        return self.web


def build(
    model: str, settings: Serving, made: Key | None = None, replica: serve.Deployment = EngineReplica
) -> serve.Application:
    """The Serve application; ``replica`` computes. Raises OwlError where there is no model folder, or no key."""
    refuse_no_model(model)
    keys_of(settings, made)
    given = settings.model_dump()
    actors: dict[str, Any] = {"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica}
    if settings.engine_python:
        actors["runtime_env"] = {"py_executable": settings.engine_python}
    ongoing = settings.room.requests + settings.room.queue
    shared = serve.deployment(Shared).options(
        name="Shared", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}, logging_config=QUIET
    )
    shared = shared.bind(settings.media)
    engine = replica.options(
        name="Engine",
        max_ongoing_requests=ongoing,
        max_queued_requests=settings.room.queue or 1,
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "initial_replicas": max(1, settings.min_replicas),
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.target_ongoing,
            "upscale_delay_s": settings.upscale_seconds,
            "downscale_delay_s": settings.downscale_seconds,
        },
        health_check_period_s=2,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options=actors,
        logging_config=QUIET,
    ).bind(model, given, shared)
    return GatewayReplica.options(  # type: ignore[attr-defined]
        name="Gateway",
        num_replicas=settings.gateways,
        max_ongoing_requests=4096,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        ray_actor_options={"num_cpus": settings.gateway_cpus},
        logging_config=QUIET,
    ).bind(model, given, engine, shared, made.model_dump() if made else None)


@contextlib.contextmanager
def running(
    model: str, settings: Serving, made: Key | None = None, replica: serve.Deployment = EngineReplica
) -> Iterator[str]:
    """Deploys, yields the endpoint's address, and takes it down. Raises OwlError where the port is taken, or where this
    Ray serves already: its port would stay what it is."""
    app = build(model, settings, made, replica)
    if serves():
        raise OwlError("Ray Serve runs on this cluster already; end it with `serve shutdown`, or use another cluster")
    port = free_port(settings.host, settings.port)
    serve.start(http_options={"host": settings.host, "port": port}, logging_config=QUIET)
    serve.run(app, name=settings.name, route_prefix="/", logging_config=QUIET)
    try:
        yield f"http://{settings.host}:{port}"
    finally:
        # serve.shutdown() by itself waits in a call that the controller's end breaks off, which Ray tells as a failure.
        if serves():
            ray.get(ray.get_actor(CONTROLLER, namespace="serve").graceful_shutdown.remote(wait=False))
        until = time.monotonic() + 60
        while serves() and time.monotonic() < until:
            time.sleep(0.2)


def serves() -> bool:
    """Whether this Ray serves something."""
    return any(actor["name"] == CONTROLLER for actor in ray.util.list_named_actors(all_namespaces=True))


def refuse_no_model(model: str) -> None:
    """Raises OwlError unless a folder has its configuration and whole files of weights. It is asked before any replica
    is replaced, since Serve ends an old one before the new one has shown that it loads."""
    if not storage.exists(f"{model}/config.json"):
        raise OwlError(f"no model folder at {model!r}: it has no config.json")
    index = f"{model}/model.safetensors.index.json"
    wanted = sorted(set(storage.read_json(index)["weight_map"].values())) if storage.exists(index) else []
    there = [name for ending in (".safetensors", ".bin") for name in storage.listing(model, ending)]
    if not (wanted or there):
        raise OwlError(f"the model folder {model!r} has no weights: no *.safetensors")
    for path in [f"{model}/{name}" for name in wanted] or there:
        try:
            if path.endswith(".safetensors"):
                safe_open(path, "np")  # reads its header, and compares its length with that
        except (OSError, SafetensorError) as problem:
            raise OwlError(f"the model's weights cannot be read: {path}: {problem}") from None


def free_port(host: str, port: int) -> int:
    """The same port if nothing listens there, or a free one in place of 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as problem:
            raise OwlError(f"cannot listen on {host}:{port}: {problem.strerror}; choose another port") from None
        return probe.getsockname()[1]
