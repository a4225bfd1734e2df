"""One URL → a picture's bytes, or the reason why not: redirects by hand, limits while reading, another try where that
can help.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from urllib.robotparser import RobotFileParser

import aiohttp
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from yarl import URL

from pipelines.curation.export import known_kind
from pipelines.fetching.politeness import (
    AddressRefused,
    Host,
    Manners,
    Unfetched,
    checked,
    opted_out,
    public_socket,
    turn,
)

FETCH_REASONS = {
    "row_malformed": "its row in the list cannot be read, or has no URL",
    "url_malformed": "the URL cannot be read",
    "scheme_refused": "neither http nor https",
    "credentials_refused": "the URL holds a user name or a password",
    "port_refused": "a port below 1024 that is not for the web",
    "address_refused": "the host's address is private, or otherwise not public",
    "robots_disallowed": "the host's robots.txt forbids it",
    "robots_unavailable": "the host's robots.txt could not be had, which forbids all for now",
    "opted_out": "its X-Robots-Tag header asks not to be used so",
    "host_unknown": "no name server knows the host",
    "host_unreachable": "the host failed too often in a row and was left alone",
    "connection_failed": "no connection, or it broke off, even when tried again",
    "tls_failed": "the host could not prove who it is",
    "timeout": "it took longer than allowed",
    "server_error": "the host was busy or broken (429 or 5xx), even when asked again",
    "http_status": "the host answered with another status than 200, such as 404",
    "redirects": "more redirects than allowed",
    "too_large": "more bytes than allowed; reading was stopped",
    "not_a_picture": "its first bytes are those of no picture format that is read",
    "failed": "something else, which the detail names",
}


class Downloading(Manners):
    """Limits of one download."""

    timeout: PositiveFloat = 30.0
    """Longest time of one request, from name look-up to last byte, in seconds."""
    connect_timeout: PositiveFloat = 10.0
    """Longest time until a connection stands, in seconds."""
    max_bytes: PositiveInt = 20_000_000
    """Largest picture file, in bytes, unpacked where the server packed it."""
    max_redirects: NonNegativeInt = 5
    """Most redirects that are followed; each is checked like a URL of the list."""
    retries: NonNegativeInt = 2
    """How often a request is repeated after 429, 5xx or a failed connection."""
    backoff: NonNegativeFloat = 1.0
    """Wait before the first repetition, in seconds; each further one waits twice as long, and up to half is cut off by
    chance so that not all come back at once."""
    longest_wait: PositiveFloat = 60.0
    """Longest wait before a repetition, in seconds, even where Retry-After asks for more."""
    concurrency: PositiveInt = 128
    """Most simultaneous requests of one process."""
    verify_tls: bool = True
    """Whether a host must prove who it is by a valid certificate."""
    proxy: str = ""
    """HTTP proxy for all requests, http://host:port; names are then looked up and private addresses kept out by the
    proxy. Proxies in the environment are never used."""


# --- what one process knows ------------------------------------------------------------------------------------------


@dataclass
class Robots:
    rules: RobotFileParser
    refusal: Unfetched | None
    """Why there are no rules, where that forbids all."""
    read_at: float


@dataclass
class Web:
    """One process's connections, and what it remembers of hosts."""

    settings: Downloading
    session: aiohttp.ClientSession
    processes: int
    """How many share each host's interval."""
    everywhere: asyncio.Semaphore
    hosts: dict[str, Host] = field(default_factory=dict)
    robots: dict[URL, asyncio.Task[Robots]] = field(default_factory=dict)

    def host(self, url: URL) -> Host:
        name = (url.raw_host or "").rstrip(".")
        if name not in self.hosts:
            connections = asyncio.Semaphore(self.settings.connections_per_host)
            self.hosts[name] = Host(connections, self.settings.interval * self.processes)
        return self.hosts[name]


IDLE = 5.0
"""Seconds that an unused connection stays open: hosts are many, open files few."""
LONGEST_HEADER = 1 << 16
"""Bytes; servers send policies longer than aiohttp's 8 KiB."""


async def open_web(settings: Downloading, processes: int) -> Web:
    """To be called in the loop that it is used in; its session must be closed."""
    guarded = not (settings.private_addresses or settings.proxy)
    connector = aiohttp.TCPConnector(
        limit=0, keepalive_timeout=IDLE, ssl=settings.verify_tls, socket_factory=public_socket if guarded else None
    )
    agent = f"{settings.user_agent} (+{settings.contact})" if settings.contact else settings.user_agent
    session = aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=settings.timeout, sock_connect=settings.connect_timeout),
        headers={"User-Agent": agent, "Accept": ACCEPTED, "Accept-Encoding": "identity"},
        max_line_size=LONGEST_HEADER,
        max_field_size=LONGEST_HEADER,
    )
    return Web(settings, session, processes, asyncio.Semaphore(settings.concurrency))


ACCEPTED = "image/jpeg, image/png, image/webp, image/gif, image/bmp, image/tiff, */*;q=0.1"

MOST_HOSTS = 20_000
"""Hosts that a process remembers between shards; those it asked last."""
A_DAY = 24 * 3600.0
"""How long RFC 9309 lets a robots.txt be kept, in seconds."""


def begin_shard(web: Web) -> None:
    """Gives hosts another chance, and forgets the oldest. No request may be under way."""
    latest = sorted(web.hosts.items(), key=lambda item: item[1].free_at)[-MOST_HOSTS:]
    web.hosts = dict(latest)
    for host in web.hosts.values():
        host.failures = 0
    web.robots = {
        origin: task for origin, task in web.robots.items() if origin.raw_host in web.hosts and still_holds(task)
    }


def still_holds(task: asyncio.Task[Robots]) -> bool:
    if task.exception() or task.result().refusal:
        return False
    return time.monotonic() - task.result().read_at < A_DAY


# --- one URL ---------------------------------------------------------------------------------------------------------


@dataclass
class Visit:
    """How far a URL led."""

    url: URL
    status: int | None = None
    """Of the last answer."""
    seconds: float = 0.0
    """Of its requests, without waits between them."""


@dataclass
class Reply:
    status: int
    headers: Mapping[str, str]
    data: bytes


Reader = Callable[[aiohttp.ClientResponse, Downloading], Awaitable[bytes]]
REDIRECTS = (301, 302, 303, 307, 308)


async def picture(web: Web, visit: Visit) -> bytes:
    """The bytes of the picture at ``visit``'s URL, which becomes the last one that was asked. Raises Unfetched."""
    reply = await follow(web, visit, read_picture, obey=web.settings.robots)
    if reply.status != 200:
        raise Unfetched("http_status", str(reply.status))
    return reply.data


async def follow(web: Web, visit: Visit, read: Reader, obey: bool) -> Reply:
    """The answer at the end of the redirects. Raises Unfetched."""
    for _ in range(web.settings.max_redirects + 1):
        visit.url = checked(visit.url, web.settings)
        if obey:
            await obey_robots(web, visit.url)
        reply = await ask(web, visit, read)
        place = reply.headers.get("Location")
        if reply.status not in REDIRECTS or not place:
            return reply
        try:
            visit.url = visit.url.join(URL(place))
        except ValueError as error:
            raise Unfetched("url_malformed", f"redirect to {place[:200]!r}: {error}") from None
    raise Unfetched("redirects", f"more than {web.settings.max_redirects}")


REPEATED = ("connection_failed", "server_error")
HOST_FAILED = (*REPEATED, "host_unknown", "tls_failed", "timeout")


async def ask(web: Web, visit: Visit, read: Reader) -> Reply:
    """One request, repeated where that can help. Raises Unfetched."""
    host, settings = web.host(visit.url), web.settings
    for attempt in range(settings.retries + 1):
        try:
            async with turn(host, web.everywhere, settings.give_up_after):
                reply = await ask_once(web, visit, read)
            host.failures = 0
            return reply
        except Unfetched as failure:
            if failure.reason == "host_unreachable":
                raise
            host.failures = host.failures + 1 if failure.reason in HOST_FAILED else 0
            pause = settings.backoff * 2**attempt * random.uniform(0.5, 1) if failure.wait is None else failure.wait
            pause = min(pause, settings.longest_wait)
            if failure.wait is not None or visit.status == 429:  # meant for whoever asks this host next
                host.free_at = max(host.free_at, time.monotonic() + pause)
                pause = 0.0
            if failure.reason not in REPEATED or attempt == settings.retries:
                raise
            await asyncio.sleep(pause)
    raise AssertionError("unreachable")


async def ask_once(web: Web, visit: Visit, read: Reader) -> Reply:
    visit.status = None
    began = time.monotonic()
    try:
        proxy = web.settings.proxy or None
        async with web.session.get(visit.url, allow_redirects=False, proxy=proxy) as response:
            visit.status = response.status
            if response.status == 429 or response.status >= 500:
                wait = retry_after(response.headers.get("Retry-After", ""))
                raise Unfetched("server_error", str(response.status), wait)
            data = await read(response, web.settings) if response.status < 400 else b""
            return Reply(response.status, response.headers, data)
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise Unfetched(reason_of(error), f"{type(error).__name__}: {error}"[:300]) from None
    finally:
        visit.seconds += time.monotonic() - began


FAILURES: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (aiohttp.ClientSSLError, "tls_failed"),
    (aiohttp.ConnectionTimeoutError, "connection_failed"),
    (TimeoutError, "timeout"),
    (aiohttp.InvalidURL, "url_malformed"),
    ((aiohttp.ClientError, OSError), "connection_failed"),
    (ValueError, "url_malformed"),
)


def reason_of(error: Exception) -> str:
    cause = getattr(error, "os_error", None)
    if isinstance(cause, AddressRefused):
        return "address_refused"
    if isinstance(cause, socket.gaierror) and cause.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
        return "host_unknown"
    return next(reason for kinds, reason in FAILURES if isinstance(error, kinds))


def retry_after(value: str) -> float | None:
    """Seconds from now that a Retry-After header names, as a number or as a date; None where it names none."""
    with contextlib.suppress(ValueError, OverflowError):
        return (
            float(int(value)) if value.isdigit() else max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        )
    return None


async def read_picture(response: aiohttp.ClientResponse, settings: Downloading) -> bytes:
    """The body of a 200, as far as it is a picture within the limits. Raises Unfetched."""
    if directive := opted_out(response.headers.getall("X-Robots-Tag", []), settings):
        raise Unfetched("opted_out", directive)
    if response.status != 200:
        return b""
    if (response.content_length or 0) > settings.max_bytes:
        raise Unfetched("too_large", f"{response.content_length} bytes")
    data = bytearray()
    async for chunk in response.content.iter_any():  # unpacked piece by piece where it is packed
        data += chunk
        if len(data) > settings.max_bytes:
            raise Unfetched("too_large", f"more than {settings.max_bytes} bytes")
        if len(data) >= ENOUGH_TO_TELL and known_kind(bytes(data[:ENOUGH_TO_TELL])) is None:
            break
    start = bytes(data[:ENOUGH_TO_TELL])
    if known_kind(start) is None:
        raise Unfetched("not_a_picture", f"{response.content_type[:80]}: {start!r}")
    return bytes(data)


ENOUGH_TO_TELL = 12
"""First bytes that tell a picture's format."""

# --- robots.txt ------------------------------------------------------------------------------------------------------


async def obey_robots(web: Web, url: URL) -> None:
    """Raises Unfetched where the robots.txt of the URL's host forbids it, or could not be had."""
    origin = url.origin()
    if origin not in web.robots:
        web.robots[origin] = asyncio.create_task(read_robots(web, origin))
    robots = await web.robots[origin]
    if robots.refusal:
        raise Unfetched(*robots.refusal.args)
    if not robots.rules.can_fetch(web.settings.user_agent, str(url)):
        raise Unfetched("robots_disallowed")


async def read_robots(web: Web, origin: URL) -> Robots:
    """RFC 9309: what is not there (4xx, or lost in redirects) allows all, what cannot be had now forbids all."""
    robots = Robots(RobotFileParser(), None, time.monotonic())
    visit = Visit(origin / "robots.txt")
    try:
        text = (await follow(web, visit, read_rules, obey=False)).data.decode("utf-8-sig", "replace")
    except Unfetched as failure:
        if failure.reason != "redirects" and visit.status != 429:
            reason = {"timeout": "robots_unavailable", "server_error": "robots_unavailable"}.get(failure.reason)
            robots.refusal = Unfetched(reason or failure.reason, f"robots.txt: {failure.detail or failure.reason}")
        text = ""
    robots.rules.parse(text.splitlines())
    delay = float(robots.rules.crawl_delay(web.settings.user_agent) or 0)
    host = web.host(origin)
    host.interval = max(host.interval, min(delay, web.settings.crawl_delay) * web.processes)
    return robots


MOST_RULES = 500 << 10
"""Bytes of a robots.txt that are read; RFC 9309 asks for no fewer."""


async def read_rules(response: aiohttp.ClientResponse, settings: Downloading) -> bytes:
    data = bytearray()
    async for chunk in response.content.iter_any():
        data += chunk
        if response.status != 200 or len(data) > MOST_RULES:
            break
    return bytes(data[:MOST_RULES]) if response.status == 200 else b""
