"""The endpoint's routes, and what stands before all of them: the key, the size of a body, a request's id, its log line.

The same application runs under uvicorn alone and in Ray Serve's gateway replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving.api import (
    ChatRequest,
    CompletionRequest,
    ErrorBody,
    Refusal,
    Tokenized,
    TokenizeRequest,
    Upload,
)
from pipelines.serving.gateway import Gateway, unless_left
from pipelines.serving.keys import OPEN, Key, hashed

log = logging.getLogger("owl.serving")
PAGE = Path(__file__).parent / "page" / "index.html"
WITHOUT_KEY = ("/health", "/")
"""The page holds nothing that is not in this repository; what it asks for needs the key."""


def application(gateway: Gateway, proxied: bool = False) -> FastAPI:
    """The ASGI application of a gateway; ``proxied`` where a proxy writes the request's id into replies."""
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": text}
        for status, text in {
            400: "A field is refused; `param` names it",
            401: "No key, or an unknown one",
            404: "No such model or upload",
            405: "Another method",
            413: "The body is too large",
            415: "The body is not of the content type that is read here",
            429: "The key has spent its budget; Retry-After says for how long",
            500: "The answer failed",
            503: "Too many requests are being answered, or no engine is ready; Retry-After says for how long",
            504: "No whole answer within the time",
        }.items()
    }
    web = FastAPI(
        title="Owl",
        summary="A vision-language model behind OpenAI's API",
        responses=refusals,
        redoc_url=None,
        lifespan=started,
    )
    web.state.gateway = gateway
    web.openapi = described(web)  # type: ignore[method-assign]
    for kind in (RequestValidationError, ValidationError):
        web.add_exception_handler(kind, invalid)
    web.add_exception_handler(HTTPException, other)
    web.add_exception_handler(Refusal, refused)
    web.add_middleware(Door, gateway=gateway, proxied=proxied)
    key = [Depends(HTTPBearer(auto_error=False, description="An API key"))]  # for the types page; Door looks at it
    for path, method, endpoint, more in ROUTES:
        needed = [] if path in WITHOUT_KEY else key
        web.add_api_route(path, endpoint, methods=[method], dependencies=needed, **more)
    return web


@contextlib.asynccontextmanager
async def started(web: FastAPI) -> AsyncIterator[None]:
    await web.state.gateway.start()
    yield
    await web.state.gateway.close()


# --- routes ----------------------------------------------------------------------------------------------------------


async def page() -> HTMLResponse:
    """A chat with pictures, in the browser."""
    return HTMLResponse(PAGE.read_text(), headers=PAGE_HEADERS)


async def health() -> dict[str, str]:
    """Whether this process answers."""
    return {"status": "ok"}


async def ready(request: Request) -> dict[str, str]:
    """Whether an engine answers."""
    await gateway_of(request).ready()
    return {"status": "ready"}


async def metrics(request: Request) -> Response:
    """What this gateway counts, as Prometheus reads it."""
    return Response(await gateway_of(request).metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def models(request: Request) -> dict[str, Any]:
    """The model and its adapters."""
    names = gateway_of(request).models.names()
    return {"object": "list", "data": [model_of(name) for name in names]}


async def model(request: Request, name: str) -> dict[str, Any]:
    """One of them."""
    gateway_of(request).models.refuse_unknown(name)
    return model_of(name)


def model_of(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "owl"}


async def chat(request: Request) -> Response:
    """An answer to a conversation with pictures."""
    gateway, body = gateway_of(request), await body_of(request, ChatRequest)
    work = await gateway.reader.chat(body, key_of(request), name_of(request))
    return await answered(request, gateway, work)


async def completions(request: Request) -> Response:
    """What follows a text."""
    gateway, body = gateway_of(request), await body_of(request, CompletionRequest)
    work = await gateway.reader.complete(body, key_of(request), name_of(request))
    return await answered(request, gateway, work)


async def tokenize(request: Request) -> Tokenized:
    """The token ids of a text or a conversation."""
    return await gateway_of(request).reader.tokenize((await body_of(request, TokenizeRequest)).root, key_of(request))


async def upload(
    request: Request, file: Annotated[UploadFile, File()], purpose: Annotated[str, Form()] = "vision"
) -> Upload:
    """Keeps a picture for requests to come, which name it by its id as an image_url."""
    if purpose != "vision":
        raise Refusal(400, "purpose: only 'vision' is kept here", "purpose")
    gateway = gateway_of(request)
    data = await file.read(gateway.settings.media.max_bytes + 1)
    return await gateway.reader.pictures.upload(data, clean(file.filename or "picture"), key_of(request))


async def uploaded(request: Request, name: str) -> Upload:
    """What was uploaded under this id."""
    found = await gateway_of(request).shared.upload(key_of(request).name, name)
    if found is None:
        raise Refusal(404, "there is no such upload, or no longer", "name")
    return Upload(**found[0])


def reading(schema: type[BaseModel]) -> dict[str, Any]:
    """What the types page says of a body that `body_of` reads."""
    content = {"application/json": {"schema": {"$ref": REFERENCE.format(model=schema.__name__)}}}
    return {"response_class": JSONResponse, "openapi_extra": {"requestBody": {"required": True, "content": content}}}


REFERENCE = "#/components/schemas/{model}"
BODIES = (ChatRequest, CompletionRequest, TokenizeRequest)


def described(web: FastAPI) -> Callable[[], dict[str, Any]]:
    """OpenAPI's description, with the types of those bodies."""

    def openapi() -> dict[str, Any]:
        if web.openapi_schema is None:
            types = FastAPI.openapi(web)["components"]["schemas"]
            for body in BODIES:
                schema = body.model_json_schema(ref_template=REFERENCE)
                types |= schema.pop("$defs", {}) | {body.__name__: schema}
        return FastAPI.openapi(web)

    return openapi


STREAMED = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
ROUTES: list[tuple[str, str, Any, dict[str, Any]]] = [
    ("/", "GET", page, {"include_in_schema": False}),
    ("/health", "GET", health, {}),
    ("/ready", "GET", ready, {}),
    ("/metrics", "GET", metrics, {"response_class": Response, "responses": {200: {"content": {"text/plain": {}}}}}),
    ("/v1/models", "GET", models, {"response_model": None}),
    ("/v1/models/{name}", "GET", model, {"response_model": None}),
    ("/v1/chat/completions", "POST", chat, {"responses": STREAMED, **reading(ChatRequest)}),
    ("/v1/completions", "POST", completions, {"responses": STREAMED, **reading(CompletionRequest)}),
    ("/v1/files", "POST", upload, {}),
    ("/v1/files/{name}", "GET", uploaded, {}),
    ("/tokenize", "POST", tokenize, reading(TokenizeRequest)),
]
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Permissions-Policy": "camera=(self)",
}


Body = TypeVar("Body", bound=BaseModel)


async def body_of(request: Request, schema: type[Body]) -> Body:
    """The body as its type; pydantic reads JSON faster than json does, and stops at depths that would end Python.
    Raises Refusal or ValidationError."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the body must be of content-type application/json")
    body = await request.body()
    if sum(body.count(mark) for mark in b",[{") > MAX_VALUES:  # millions of them take long to be refused one by one
        raise Refusal(400, f"the body has more than {MAX_VALUES} values")
    return schema.model_validate_json(body)


MAX_VALUES = 200_000


def gateway_of(request: Request) -> Gateway:
    return request.app.state.gateway


def key_of(request: Request) -> Key:
    return request.scope["owl"]["key"]


def name_of(request: Request) -> str:
    return request.scope["owl"]["id"]


async def answered(request: Request, gateway: Gateway, work) -> Response:
    """The answer as asked for, streamed or whole; a client that goes away ends it."""
    request.scope["owl"]["work"] = work
    if work.request.stream:
        events = gateway.events(work)
        first = await unless_left(anext(events), left(request))  # what is refused is refused with its status
        if first is None:
            await events.aclose()
            return Response(status_code=499)

        async def all_of_them():
            try:
                yield first
                async for event in events:
                    yield event
            finally:
                await events.aclose()

        return StreamingResponse(all_of_them(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    whole = await unless_left(gateway.whole(work), left(request))
    return JSONResponse(whole) if whole is not None else Response(status_code=499)


async def left(request: Request) -> None:
    """Ends when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --- refusals --------------------------------------------------------------------------------------------------------


async def invalid(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, RequestValidationError | ValidationError)
    first = max(problem.errors(), key=lambda error: len(error["loc"]))  # of a union's members the one that fits best
    places = [str(part) for part in first["loc"] if part not in ("body", "query", "path") and not is_kind(part)]
    place = clean(".".join(places))
    message = "the body is not JSON" if first["type"] == "json_invalid" else clean(first["msg"])
    return answer_of(Refusal(400, f"{place}: {message}" if place else message, place or None))


def is_kind(part: Any) -> bool:
    """pydantic's names of a union's members say nothing to a client."""
    return isinstance(part, str) and bool(re.match(r"(list\[|function-|str$|int$|text$|image_url$|video_url$)", part))


async def other(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    told = {404: "there is no such route", 405: "this route takes another method"}
    refusal = Refusal(problem.status_code, told.get(problem.status_code, clean(str(problem.detail))))
    response = answer_of(refusal)
    response.headers.update(problem.headers or {})
    return response


async def refused(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, Refusal)
    return answer_of(problem)


def answer_of(refusal: Refusal) -> Response:
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


def clean(text: str) -> str:
    """A client's words in a reply: short, and such that they can be written."""
    return "".join(c if c.isprintable() else "?" for c in text[:200]).encode("utf-8", "replace").decode()


# --- before and after every route ------------------------------------------------------------------------------------


class Door:
    """ASGI middleware: gives each request an id, asks for the key, reads the body up to its cap, and writes one line
    to the log. What fails behind it is answered 500, in OpenAI's shape, with no more than the id."""

    def __init__(self, app: ASGIApp, gateway: Gateway, proxied: bool):
        self.app, self.gateway, self.proxied = app, gateway, proxied

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, headers = time.monotonic(), Headers(scope=scope)
        name = headers.get("x-request-id", "")
        if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,100}", name):
            name = uuid.uuid4().hex
        known = scope["owl"] = {"id": f"{name}-{uuid.uuid4().hex[:8]}", "key": OPEN, "work": None}
        status = 0

        async def reply(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {} if self.proxied else {"x-request-id": name}
                MutableHeaders(scope=message).update({"x-content-type-options": "nosniff", **own})
            await send(message)

        try:
            known["key"] = self.admitted(scope["path"], headers)
            read = await self.body(scope, headers, receive)
            await self.app(scope, read, reply)
        except Refusal as refusal:
            await answer_of(refusal)(scope, receive, reply)
        except Exception:
            log.exception("%s failed", known["id"])
            if not status:
                told = f"the request failed; the log has the reason under {name}"
                await answer_of(Refusal(500, told))(scope, receive, reply)
        finally:
            self.note(scope, known, status, time.monotonic() - began)

    def admitted(self, path: str, headers: Headers) -> Key:
        """Whose request it is. Raises Refusal."""
        if self.gateway.keys is None or path in WITHOUT_KEY:
            return OPEN
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        key = self.gateway.keys.get(hashed(secret.strip())) if scheme.lower() == "bearer" else None
        if key is None:
            told = "the API key is unknown" if secret else "give an API key: Authorization: Bearer KEY"
            raise Refusal(401, told, code="invalid_api_key")
        return key

    async def body(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """The body, whole, to be read again; afterwards what the client does next. Raises Refusal."""
        cap = self.gateway.settings.max_body_bytes
        too_large = Refusal(413, f"the body has more than {cap} bytes")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            raise Refusal(400, "content-length is no number")
        if int(length) > cap:
            raise too_large
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(SECONDS_FOR_A_BODY):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    parts.append(message.get("body", b""))
                    size, more = size + len(parts[-1]), message.get("more_body", False)
                    if size > cap:
                        raise too_large
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {SECONDS_FOR_A_BODY} s") from None
        whole: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def read() -> Message:
            return whole.pop() if whole else await receive()

        return read

    def note(self, scope: Scope, known: dict, status: int, seconds: float) -> None:
        """A line of a request, without anything of its content."""
        key, work = known["key"].name, known["work"]
        if status >= 400:
            self.gateway.meters.count("request_errors_total", key=key, status=str(status))
        tokens = (work.prompt, sum(len(answer) for answer in work.answers)) if work else (0, 0)
        log.info(
            "%s %s %s key=%s status=%d seconds=%.3f prompt_tokens=%d completion_tokens=%d",
            known["id"],
            scope["method"],
            clean(scope["path"]),
            key,
            status,
            seconds,
            *tokens,
        )


SECONDS_FOR_A_BODY = 60
