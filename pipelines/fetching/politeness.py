"""Who may be asked, and how often: URLs that are refused, addresses that are not public, robots.txt, opt-out headers,
and turns at a host.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import NonNegativeFloat, PositiveInt
from yarl import URL

from pipelines.settings import Settings


class Manners(Settings):
    """How hosts are treated."""

    user_agent: str = "owl-vlm/0.1"
    """Name that requests carry; what stands before the slash is looked up in robots.txt and opt-out headers."""
    contact: str = ""
    """A web or mail address that is added to the name, for those who want to complain."""
    robots: bool = True
    """Whether each host's robots.txt is asked for and obeyed."""
    disallowed_header_directives: list[str] = ["noai", "noimageai", "noindex", "noimageindex"]
    """Directives of an X-Robots-Tag header that opt a picture out; an empty list disregards the header."""
    interval: NonNegativeFloat = 0.1
    """Least time between two requests to one host, in seconds, all processes together."""
    crawl_delay: NonNegativeFloat = 5.0
    """Longest Crawl-delay of a robots.txt that is obeyed, in seconds; a longer one is cut to this."""
    connections_per_host: PositiveInt = 2
    """Most simultaneous requests to one host, by each process."""
    give_up_after: PositiveInt = 10
    """A host that fails so many times in a row is not asked again in this shard."""
    private_addresses: bool = False
    """Whether private, loopback, link-local and other addresses that are not public may be asked, as in an intranet."""
    ports: list[int] = []
    """Ports below 1024 that may be asked besides 80 and 443. From 1024 on all may: below are mail, shells and the like,
    which a list could have us talk to."""


class Unfetched(Exception):
    """Why a URL gave no picture: ``reason`` is a name of FETCH_REASONS, ``detail`` for people, and ``wait`` the seconds
    that the host asked for, if it did."""

    def __init__(self, reason: str, detail: str | None = None, wait: float | None = None):
        super().__init__(reason, detail, wait)
        self.reason, self.detail, self.wait = reason, detail, wait


# --- URLs and addresses ----------------------------------------------------------------------------------------------


def checked(url: URL, manners: Manners) -> URL:
    """The URL with its host in canonical form. Raises Unfetched where it may not be asked at all."""
    if url.scheme not in ("http", "https"):
        raise Unfetched("scheme_refused", url.scheme[:40])
    if url.user is not None or url.password is not None:
        raise Unfetched("credentials_refused")
    if not url.raw_host:
        raise Unfetched("url_malformed", "it names no host")
    if url.port is not None and url.port < 1024 and url.port not in (80, 443, *manners.ports):
        raise Unfetched("port_refused", str(url.port))
    url = dotted(url)
    with contextlib.suppress(ValueError):  # a name; what it stands for is seen when it is connected to
        if not manners.private_addresses and not is_public(ipaddress.ip_address(url.raw_host or "")):
            raise Unfetched("address_refused", url.raw_host)
    return url


def dotted(url: URL) -> URL:
    """An IPv4 address in decimal, hexadecimal, octal or short form (http://2130706433/) in its usual one."""
    try:
        return url.with_host(socket.inet_ntoa(socket.inet_aton(url.raw_host or "")))
    except OSError:
        return url


GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
NAT64 = ipaddress.ip_network("64:ff9b::/96")
CLOUD_HOSTS = frozenset({ipaddress.ip_address("168.63.129.16")})
"""Public by number, but answered by the cloud (Azure) that a machine runs in."""


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether anyone on the internet means the same host by it. IPv6 that wraps an IPv4 address is judged by that."""
    if isinstance(address, ipaddress.IPv4Address):
        special = address.is_multicast or address.is_reserved or address in CLOUD_HOSTS
        return address.is_global and not special
    wrapped = address.ipv4_mapped or address.sixtofour
    if address in NAT64:
        wrapped = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return is_public(wrapped) if wrapped else address in GLOBAL_UNICAST and address.is_global


class AddressRefused(OSError):
    """A host's name stands for an address that is not public."""


def public_socket(info: tuple[Any, ...]) -> socket.socket:
    """A socket for an address that getaddrinfo gave: the last thing before a connection, so that no name, redirect or
    second answer of a name server gets past it. Raises AddressRefused."""
    family, kind, protocol, _, address = info
    if not is_public(ipaddress.ip_address(address[0])):
        raise AddressRefused(errno.EACCES, "its address is not public")
    return socket.socket(family, kind, protocol)


# --- opting out ------------------------------------------------------------------------------------------------------

WITH_VALUES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
"""Directives whose colon is followed by a value; any other colon follows the name of a user agent."""


def opted_out(headers: Iterable[str], manners: Manners) -> str | None:
    """The first disallowed directive in some X-Robots-Tag headers that is meant for all or for us, or None."""
    disallowed = {directive.lower() for directive in manners.disallowed_header_directives}
    meant = {None, "*", product(manners)}
    for header in headers:
        agent: str | None = None
        for part in header.lower().split(","):
            name, colon, rest = (text.strip() for text in part.partition(":"))
            if colon and name not in WITH_VALUES:
                agent, name = name, rest
            if agent in meant and name in disallowed:
                return name
    return None


def product(manners: Manners) -> str:
    return manners.user_agent.partition("/")[0].strip().lower()


# --- turns -----------------------------------------------------------------------------------------------------------


@dataclass
class Host:
    """What a process knows of one host."""

    connections: asyncio.Semaphore
    interval: float
    """Seconds between two requests of this process."""
    queue: asyncio.Lock = field(default_factory=asyncio.Lock)
    free_at: float = 0.0
    """When it may be asked next, by the monotonic clock."""
    failures: int = 0
    """In a row, in this shard."""


@contextlib.asynccontextmanager
async def turn(host: Host, everywhere: asyncio.Semaphore, give_up_after: int) -> AsyncIterator[None]:
    """Waits until ``host`` may be asked again and one of the process's connections is free. Raises Unfetched where the
    host has been given up meanwhile."""
    async with host.connections:
        async with host.queue:  # held while waiting for a connection too, or two would leave at once
            while host.failures < give_up_after and (wait := host.free_at - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            if host.failures >= give_up_after:
                raise Unfetched("host_unreachable", f"it failed {host.failures} times in a row")
            await everywhere.acquire()
            host.free_at = max(host.free_at, time.monotonic() + host.interval)
        try:
            yield
        finally:
            everywhere.release()
