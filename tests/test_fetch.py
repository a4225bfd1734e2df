"""Fetching from a real server on loopback: what comes, what is refused, how politely it is asked, and going on."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import gzip
import io
import json
import random
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter, defaultdict
from ipaddress import ip_address
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from PIL import Image

from jobs.cli import main
from pipelines.curation.curate import curate
from pipelines.curation.options import Curation
from pipelines.curation.sources import find_shards, read_shard
from pipelines.fetching import politeness
from pipelines.fetching.download import FETCH_REASONS, open_web, retry_after
from pipelines.fetching.fetch import Answer, Fetching, answers_to, fetch, write_shard
from pipelines.fetching.lists import Cutting, Row, Slice, cut, rows_of
from pipelines.fetching.politeness import Manners, is_public, opted_out
from pipelines.settings import OwlError

HOSTS = [f"127.0.0.{number}" for number in range(1, 8)]
ROBOTS = {
    "127.0.0.2": (200, "User-agent: *\nDisallow: /private\n\nUser-agent: owl-vlm\nDisallow: /ours\nCrawl-delay: 1"),
    "127.0.0.3": (503, ""),
    "127.0.0.4": (200, None),  # never ends
    "127.0.0.5": (302, "http://127.0.0.2:{port}/robots.txt"),
    "127.0.0.6": (403, "User-agent: *\nDisallow: /"),
}
"""What each host answers to /robots.txt: the status, and the text or the place it redirects to; 404 otherwise."""


def picture(number: int) -> bytes:
    """Noise of its own for each number; JPEG and PNG by turns."""
    buffer = io.BytesIO()
    image = Image.frombytes("RGB", (12, 12), random.Random(number).randbytes(432)).resize((96, 96))
    image.save(buffer, "PNG" if number % 2 else "JPEG")
    return buffer.getvalue()


class Site:
    """A web server on several loopback addresses, which remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, str, str, dict[str, str]]] = []
        self.active: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.tries: Counter[str] = Counter()
        self.port = 0
        self.loop = asyncio.new_event_loop()
        ready = threading.Event()
        self.thread = threading.Thread(target=self.serve, args=(ready,), daemon=True)
        self.thread.start()
        assert ready.wait(10)

    def serve(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self.loop)
        app = web.Application(middlewares=[self.remember])
        app.router.add_get("/{tail:.*}", self.answer)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        self.loop.run_until_complete(runner.setup())
        for host in HOSTS:
            site = web.TCPSite(runner, host, self.port)
            self.loop.run_until_complete(site.start())
            self.port = self.port or runner.addresses[0][1]
        ready.set()
        self.loop.run_forever()
        self.loop.run_until_complete(runner.cleanup())

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    @web.middleware
    async def remember(self, request, handler):
        host = request.url.host
        self.asked.append((time.monotonic(), host, request.path_qs, dict(request.headers)))
        for name in (host, "all"):
            self.active[name] += 1
            self.most[name] = max(self.most[name], self.active[name])
        try:
            return await handler(request)
        finally:
            self.active.subtract([host, "all"])

    async def answer(self, request) -> web.StreamResponse:
        first, _, rest = request.path.lstrip("/").partition("/")
        return await getattr(self, first.replace(".", "_"), self.missing)(request, rest)

    async def missing(self, request, rest):
        return web.Response(status=404)

    async def robots_txt(self, request, rest):
        status, text = ROBOTS.get(request.url.host, (404, ""))
        if text is None:
            await asyncio.sleep(5)
        if status == 302:
            return web.Response(status=302, headers={"Location": text.format(port=self.port)})
        return web.Response(status=status, text=text)

    async def good(self, request, rest):
        await asyncio.sleep(float(request.query.get("wait", 0)))
        headers = {"Set-Cookie": "seen=before"}
        if "tag" in request.query:
            headers["X-Robots-Tag"] = request.query["tag"]
        return web.Response(body=picture(int(rest)), headers=headers)

    private = ours = good

    async def page(self, request, rest):
        return web.Response(text="<html>gone</html>", content_type="image/jpeg")

    async def empty(self, request, rest):
        return web.Response(body=b"")

    async def status(self, request, rest):
        """/status/503,429:2,200/name: one after another; after a colon stands Retry-After."""
        codes, _, _ = rest.partition("/")
        answers = codes.split(",")
        code, _, wait = answers[min(self.tries[rest], len(answers) - 1)].partition(":")
        self.tries[rest] += 1
        return web.Response(
            status=int(code),
            body=picture(1) if code == "200" else b"",
            headers={"Retry-After": wait} if wait else {},
        )

    async def hang(self, request, rest):
        await asyncio.sleep(5)

    async def large(self, request, rest):
        return web.Response(body=picture(1) + bytes(300_000))

    async def endless(self, request, rest):
        """Chunked, without a length."""
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(picture(1))
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(bytes(10_000))
                self.tries["endless"] += 1

    async def packed(self, request, rest):
        data = picture(1) if rest == "picture" else picture(1) + bytes(20_000_000)
        return web.Response(body=gzip.compress(data, 1), headers={"Content-Encoding": "gzip"})

    async def broken(self, request, rest):
        """Promises more than it sends."""
        response = web.StreamResponse(headers={"Content-Length": "100000"})
        await response.prepare(request)
        await response.write(picture(1))
        request.transport.close()
        return response

    async def to(self, request, rest):
        """/to/3/PLACE: three redirects, then to PLACE."""
        count, _, place = request.raw_path.partition("?")[0].removeprefix("/to/").partition("/")
        if int(count) > 1:
            place = f"to/{int(count) - 1}/{place}"
        if "://" not in place or place.startswith("to/"):
            place = f"/{place}"
        return web.Response(status=302, headers={"Location": place, "X-Robots-Tag": request.query.get("tag", "all")})


@pytest.fixture(scope="module")
def site():
    site = Site()
    yield site
    site.close()


@pytest.fixture
def ask(site):
    """Fetches URLs ("/path" is one on 127.0.0.1, "2/path" on 127.0.0.2) in this process; returns what became of each.
    In ``pictures`` is what was put aside."""

    def run(*places: str, processes: int = 1, pictures: list | None = None, **changed) -> list[Answer]:
        quick = {"private_addresses": True, "interval": 0, "backoff": 0.01, "timeout": 1, "max_bytes": 200_000}
        rows = [Row(number, url_of(site, place), ["a dog runs"]) for number, place in enumerate(places)]
        with asyncio.Runner() as runner, tempfile.TemporaryFile() as aside:
            connections = runner.run(open_web(Fetching(**quick | changed), processes))
            try:
                answers = runner.run(answers_to(rows, connections, "list", aside))
            finally:
                runner.run(connections.session.close())
            for answer in answers if pictures is not None else ():
                aside.seek(answer.offset)
                pictures.append(aside.read(answer.bytes or 0))
        assert all(answer.reason is None or answer.reason in FETCH_REASONS for answer in answers)
        return answers

    return run


def url_of(site: Site, place: str) -> str:
    number, slash, rest = place.partition("/")
    return f"http://127.0.0.{number or 1}:{site.port}/{rest}" if slash and number in ("", *"1234567") else place


def reasons(answers: list[Answer]) -> list[str | None]:
    return [answer.reason for answer in answers]


def since(site: Site, begin: int, path: str) -> list[tuple[float, str, str, dict[str, str]]]:
    return [item for item in site.asked[begin:] if item[2].startswith(path)]


# --- what comes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "reason", "status"),
    [
        ("/good/1", None, 200),
        ("/packed/picture", None, 200),
        ("/nowhere", "http_status", 404),
        ("/status/204", "http_status", 204),
        ("/status/304", "http_status", 304),
        ("/status/500,200/a", None, 200),
        ("/status/503,429,200/b", None, 200),
        ("/status/500/c", "server_error", 500),
        ("/status/429/d", "server_error", 429),
        ("/hang", "timeout", None),
        ("/large", "too_large", 200),
        ("/endless", "too_large", 200),
        ("/packed/bomb", "too_large", 200),
        ("/page", "not_a_picture", 200),
        ("/empty", "not_a_picture", 200),
        ("/broken", "connection_failed", 200),
        ("http://127.0.0.1:9/", "port_refused", None),
        ("http://127.0.0.1:1/", "port_refused", None),
        ("http://127.0.0.99:40009/x.jpg", "connection_failed", None),
        ("file:///etc/passwd", "scheme_refused", None),
        ("ftp://127.0.0.1/x.jpg", "scheme_refused", None),
        ("data:image/png;base64,iVBORw0KGgo=", "scheme_refused", None),
        ("picture.jpg", "scheme_refused", None),
        ("http:///x.jpg", "url_malformed", None),
        ("http://host:99999/x.jpg", "url_malformed", None),
        ("http://[::1/x.jpg", "url_malformed", None),
        (f"http://{'a' * 300}.example/x.jpg", "url_malformed", None),
        ("http://owl:secret@127.0.0.1/x.jpg", "credentials_refused", None),
        ("http://owl@127.0.0.1/x.jpg", "credentials_refused", None),
    ],
)
def test_what_becomes_of_a_url(ask, place, reason, status):
    [answer] = ask(place, robots=False)
    assert (answer.reason, answer.visit.status) == (reason, status), answer


def test_a_host_that_cannot_prove_itself(ask, site):
    assert reasons(ask(f"https://127.0.0.1:{site.port}/good/1")) == ["tls_failed"]


def test_an_unknown_host(ask, monkeypatch):
    def unknown(*args, **named):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert reasons(ask("http://nobody.example/x.jpg")) == ["host_unknown"]


def test_reading_stops_at_the_limit(ask, site):
    site.tries["endless"] = 0
    ask("/endless", max_bytes=50_000)
    time.sleep(0.2)
    assert site.tries["endless"] < 1000  # ten megabytes: what sockets hold, and no more


def test_pictures_are_the_bytes_that_came_in_the_order_of_the_list(ask):
    pictures: list[bytes] = []
    places = [f"/good/{number}?wait={0.2 - number / 100}" for number in range(20)]
    answers = ask(*places, pictures=pictures, connections_per_host=20)
    assert [answer.offset for answer in answers] != sorted(answer.offset for answer in answers)
    assert pictures == [picture(number) for number in range(20)]
    assert [answer.key for answer in answers] == [f"list-{number:09d}" for number in range(20)]


def test_requests_carry_a_name_and_nothing_of_the_user(ask, site, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    known = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args, **named: known("127.0.0.1", *args, **named))
    begin = len(site.asked)
    named = [f"http://pictures.example:{site.port}{path}" for path in ("/good/1", "/to/1/good/2", "/good/3")]
    assert reasons(ask(*named, contact="https://owl.example", connections_per_host=1)) == [None] * 3
    _, _, _, headers = since(site, begin, "/good/1")[0]
    assert headers["User-Agent"] == "owl-vlm/0.1 (+https://owl.example)"
    for _, _, _, headers in site.asked[begin:]:
        assert not headers.keys() & {"Referer", "Cookie", "Authorization", "Proxy-Authorization"}


def test_a_proxy_is_used_where_asked_for(ask, site):
    """The server takes the part of the proxy: it is sent whole URLs."""
    proxy = f"http://127.0.0.1:{site.port}"
    there, inside = ask("http://far.example/good/3", "http://10.0.0.1/x", proxy=proxy, private_addresses=False)
    assert (there.reason, there.visit.status) == (None, 200)
    assert inside.reason == "address_refused"


# --- opting out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "directive"),
    [
        ([], None),
        (["all"], None),
        (["noai"], "noai"),
        (["NoImageAI"], "noimageai"),
        (["nofollow, noindex"], "noindex"),
        (["nofollow", "noimageindex"], "noimageindex"),
        (["owl-vlm: noai"], "noai"),
        (["Owl-VLM : nofollow , noai"], "noai"),
        (["*: noai"], "noai"),
        (["otherbot: noai"], None),
        (["otherbot: noindex, noai"], None),
        (["otherbot: noindex, owl-vlm: noai"], "noai"),
        (["otherbot: noindex", "noai"], "noai"),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST, noai"], "noai"),
        (["max-snippet: 10, noindex"], "noindex"),
        (["noaim, indexnoai"], None),
    ],
)
def test_opt_out_headers(headers, directive):
    assert opted_out(headers, Manners()) == directive


def test_opting_out_is_heard_on_every_hop_and_by_setting(ask):
    places = ("/good/1?tag=noai", "/good/1?tag=otherbot:+noai", "/to/1/good/1?tag=owl-vlm:+noindex", "/good/2")
    assert reasons(ask(*places)) == ["opted_out", None, "opted_out", None]
    assert reasons(ask(*places, disallowed_header_directives=[])) == [None] * 4


def test_robots(ask, site):
    begin = len(site.asked)
    places = ("/good/1", "2/good/1", "2/private/1", "2/ours/1", "3/good/1", "4/good/1", "5/ours/1", "6/good/1")
    to_private = f"/to/1/http://127.0.0.2:{site.port}/ours/1"
    answers = ask(*places, *places, to_private, timeout=0.5, crawl_delay=0)
    expected = [
        None,
        None,
        None,  # a group of our own stands before that of all
        "robots_disallowed",
        "robots_unavailable",
        "robots_unavailable",
        "robots_disallowed",  # by the rules that it redirects to
        None,  # 403: there are no rules
    ]
    assert reasons(answers) == [*expected, *expected, "robots_disallowed"]
    asked = Counter(host for _, host, _, _ in since(site, begin, "/robots.txt"))
    assert asked["127.0.0.1"] == asked["127.0.0.6"] == asked["127.0.0.4"] == 1
    assert asked["127.0.0.3"] == 3  # 503 is tried again
    assert reasons(ask("2/ours/1", "3/good/1", robots=False)) == [None, None]
    assert reasons(ask("2/ours/1", "2/private/1", user_agent="other/1", crawl_delay=0)) == [None, "robots_disallowed"]


# --- redirects and addresses -----------------------------------------------------------------------------------------


def test_redirects(ask, site):
    good, long, bad, scheme = ask("/to/5/good/1", "/to/6/good/1", "/to/1/http://h:99999/", "/to/1/file:///etc/passwd")
    assert (good.reason, good.visit.url.path) == (None, "/good/1")
    assert [long.reason, bad.reason, scheme.reason] == ["redirects", "url_malformed", "scheme_refused"]
    assert reasons(ask("/to/2/good/1", max_redirects=1)) == ["redirects"]


ODD = (
    "http://127.0.0.1:{port}/",
    "http://2130706433:{port}/",
    "http://0x7f000001:{port}/",
    "http://0x7f.1:{port}/",
    "http://017700000001:{port}/",
    "http://127.1:{port}/",
    "http://①②⑦.0.0.1:{port}/",
    "http://localhost:{port}/",
    "http://0:{port}/",
    "http://0.0.0.0:{port}/",
    "http://[::1]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/",
    "http://[64:ff9b::127.0.0.1]:{port}/",
    "http://[2002:7f00:1::]:{port}/",
    "http://[fe80::1%25eth0]:{port}/",
    "http://169.254.169.254/latest/meta-data/",
    "http://pictures.example:{port}/",
)


def test_no_spelling_of_a_private_address_is_connected_to(ask, site, monkeypatch):
    known = socket.getaddrinfo

    def look_up(host, *args, **named):  # a name that looks public, and stands for this machine
        return known("127.0.0.1" if host == "pictures.example" else host, *args, **named)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    begin = len(site.asked)
    places = [place.format(port=site.port) for place in ODD]
    assert reasons(ask(*places, private_addresses=False)) == ["address_refused"] * len(ODD)
    assert len(site.asked) == begin
    allowed = ask(*(f"{places[i]}good/1" for i in (1, 2, 3, 4, 5, 17)))
    assert reasons(allowed) == [None] * 6


def test_redirects_and_robots_are_held_to_the_address_that_is_connected_to(ask, site, monkeypatch):
    """For a while 127.0.0.1 is a public address and 127.0.0.2 a private one."""
    monkeypatch.setattr(politeness, "is_public", lambda address: str(address) == "127.0.0.1")
    known = socket.getaddrinfo
    answers = iter(["127.0.0.1"] * 2)  # for robots.txt and the picture; the next look-up tells another address

    def look_up(host, *args, **named):
        rebound = {"inside.example": "127.0.0.2", "both.example": "127.0.0.1"}
        if host == "turning.example":
            return known(next(answers, "127.0.0.2"), *args, **named)
        return known(rebound.get(host, host), *args, **named)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    begin = len(site.asked)
    good, by_number, by_name = ask(
        f"http://both.example:{site.port}/good/1",
        f"/to/2/http://127.0.0.2:{site.port}/good/1",
        f"/to/2/http://inside.example:{site.port}/good/1",
        private_addresses=False,
    )
    assert [good.reason, by_number.reason, by_name.reason] == [None, "address_refused", "address_refused"]
    turned = [f"http://turning.example:{site.port}/good/{number}" for number in range(3)]
    assert "address_refused" not in reasons(ask(turned[0], private_addresses=False))
    list(answers)
    assert reasons(ask(turned[1], private_addresses=False)) == ["address_refused"]
    assert {host for _, host, _, _ in site.asked[begin:]} == {"127.0.0.1", "both.example", "turning.example"}


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("168.63.129.16", False),
        ("100.64.0.1", False),
        ("198.18.0.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("0.0.0.0", False),
        ("2606:4700::1111", True),
        ("::", False),
        ("::1", False),
        ("::127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::10.0.0.1", False),
        ("64:ff9b::8.8.8.8", True),
        ("64:ff9b:1::1", False),
        ("2002:a00:1::1", False),
        ("2002:808:808::1", True),
        ("2001::1", False),
        ("2001:db8::1", False),
        ("fe80::1", False),
        ("fec0::1", False),
        ("fc00::1", False),
        ("fd00:ec2::254", False),
        ("ff02::1", False),
    ],
)
def test_public_addresses(address, public):
    assert is_public(ip_address(address)) is public


def test_ports(ask):
    assert reasons(ask("http://127.0.0.99:25/x", "http://127.0.0.99:443/x", ports=[25], robots=False)) == [
        "connection_failed",
        "connection_failed",
    ]


# --- how politely ----------------------------------------------------------------------------------------------------


def test_hosts_are_asked_one_interval_apart(ask, site):
    begin = len(site.asked)
    ask(*(f"{host}/good/{n}" for n in range(5) for host in "17"), interval=0.05, processes=3, robots=False)
    for host in ("127.0.0.1", "127.0.0.7"):
        times = [at for at, name, _, _ in site.asked[begin:] if name == host]
        assert len(times) == 5
        assert times[-1] - times[0] >= 4 * 0.05 * 3 - 0.03  # less what the first took longer on its way


def test_a_stated_crawl_delay_is_kept_up_to_the_limit(ask, site):
    begin = len(site.asked)
    ask("2/good/1", "2/good/2", "2/good/3", crawl_delay=0.3)
    times = [at for at, _, _, _ in since(site, begin, "/good")]
    assert times[-1] - times[0] >= 2 * 0.3 - 0.03


def test_no_more_requests_at_once_than_allowed(ask, site):
    site.most.clear()
    places = [f"{host}/good/{n}?wait=0.05" for n in range(6) for host in "167"]
    assert set(reasons(ask(*places, connections_per_host=2, concurrency=5, robots=False))) == {None}
    assert [site.most[host] for host in ("127.0.0.1", "127.0.0.6", "127.0.0.7")] == [2, 2, 2]
    assert site.most["all"] == 5


def test_retry_after_holds_the_whole_host(ask, site):
    begin = len(site.asked)
    places = ("/status/429:1,200/e", "/status/200/f", "/status/503:900,200/g")
    answers = ask(*places, connections_per_host=1, longest_wait=0.6, robots=False)
    assert reasons(answers) == [None] * 3
    times = [at for at, _, _, _ in since(site, begin, "/status")]
    assert len(times) == 5
    assert times[1] - times[0] >= 0.6 - 0.03
    assert times[-1] - times[0] >= 2 * 0.6 - 0.06


@pytest.mark.parametrize(
    ("value", "seconds"), [("", None), ("7", 7.0), ("soon", None), ("Fri, 01 Jan 1999 00:00:00 GMT", 0.0), ("²", None)]
)
def test_retry_after_values(value, seconds):
    assert retry_after(value) == seconds


def test_a_dead_host_is_given_up_and_holds_up_nobody(ask, site):
    places = [f"http://127.0.0.99:40009/{n}" for n in range(50)] + [f"7/good/{n}" for n in range(10)]
    answers = ask(*places, give_up_after=4, robots=False, backoff=0.05, interval=0.01)
    counted = Counter(reasons(answers))
    assert counted[None] == 10
    assert counted["host_unreachable"] >= 45
    began = time.monotonic()
    begin = len(site.asked)
    hanging = ask(*(f"/hang/{n}" for n in range(50)), give_up_after=2, robots=False, timeout=0.2)
    assert Counter(reasons(hanging))["host_unreachable"] >= 46
    assert len(site.asked) - begin <= 4
    assert time.monotonic() - began < 20  # fifty time limits at two a time would be five seconds, and many retries more


def test_a_host_that_fails_now_and_then_is_not_given_up(ask):
    places = [f"/status/{200 if n % 2 else 500}/again{n}" for n in range(12)]
    answers = ask(*places, give_up_after=2, retries=0, connections_per_host=1, robots=False)
    assert reasons(answers) == ["server_error", None] * 6


# --- lists -----------------------------------------------------------------------------------------------------------


def test_lists_are_cut_and_read_by_slices(tmp_path):
    urls = [f"http://h.example/{n}.jpg" for n in range(23)]
    captions = [f'a "dog",\nnumber {n} – ü' for n in range(23)]
    table = pa.table({"TEXT": captions, "other": list(range(23)), "URL": urls})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    with open(tmp_path / "b.jsonl", "w") as file:
        for url, caption in zip(urls, captions, strict=True):
            file.write(json.dumps({"image_url": url, "alt": caption}) + "\n\n")
    with open(tmp_path / "c.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["url", "caption"])
        writer.writerows(zip(urls, captions, strict=True))
    for name in ("a.parquet", "b.jsonl", "c.csv"):
        for size in (1, 5, 7, 23, 100):
            cutting = Cutting(samples_per_shard=size)
            slices = cut(f"{tmp_path}/{name}", cutting)
            assert [part.rows for part in slices] == [min(size, 23 - first) for first in range(0, 23, size)]
            rows = [row for part in reversed(slices) for row in rows_of(part, cutting)]
            rows.sort(key=lambda row: row.number)
            assert [(row.number, row.url, row.captions) for row in rows] == [
                (n, url, [caption]) for n, (url, caption) in enumerate(zip(urls, captions, strict=True))
            ]


def test_rows_that_cannot_be_read_are_rows(tmp_path, ask):
    lines = [
        '{"url": "http://h/1.jpg", "caption": "a dog"}',
        "{broken",
        "[1, 2]",
        '{"caption": "no url"}',
        '{"url": 5, "caption": "a number"}',
        '{"url": "  ", "caption": null}',
        '{"url": "http://h/\\ud83d.jpg", "caption": ["half \\ud83d", "two"]}',
        "[" * 100_000,
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    [part] = cut(f"{tmp_path}/list.jsonl", Cutting())
    rows = rows_of(part, Cutting())
    assert [row.url is None for row in rows] == [False, True, True, True, True, True, False, True]
    assert rows[6].captions == ["half ?", "two"]
    assert all(row.problem for row in rows if row.url is None)
    (tmp_path / "list.csv").write_text('url,caption\nhttp://h/1.jpg\n\n,"b"\n"http://h/3.jpg","c",more\n')
    [part] = cut(f"{tmp_path}/list.csv", Cutting())
    assert [(row.url, row.captions) for row in rows_of(part, Cutting())] == [
        ("http://h/1.jpg", [""]),
        (None, ["b"]),
        ("http://h/3.jpg", ["c"]),
    ]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "link,caption\nx,y\n", "has no column url or URL or image_url; name one of its own with url_column"),
        ("a.csv", "url,words\nx,y\n", "name one of its own with caption_column: url, words"),
        ("a.csv", "", "has no column"),
        ("a.jsonl", '{"link": "x"}\n', "has no column url"),
        ("a.parquet", "this is no parquet", "cannot be read"),
        ("a.txt", "http://h/x.jpg", r"is no URL list: known are .parquet, .jsonl and .csv"),
        ("b.csv", "url,caption\n", "no URL lists at"),
    ],
)
def test_lists_that_cannot_be_used_are_named_before_anything_is_written(cluster, tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(OwlError, match=says):
        fetch([f"{tmp_path}/a.*"], f"{tmp_path}/raw", Fetching())
    assert not (tmp_path / "raw").exists()


def test_lists_of_one_name_are_refused(cluster, tmp_path):
    for name in ("x/a.b.csv", "y/a_b.csv"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("url,caption\nhttp://h/1.jpg,x\n")
    with pytest.raises(OwlError, match="would give shards of one name"):
        fetch([f"{tmp_path}/*/*.csv"], f"{tmp_path}/raw", Fetching())


# --- the whole step --------------------------------------------------------------------------------------------------

QUICK = {"private_addresses": True, "interval": 0, "backoff": 0.01, "timeout": 2, "processes": 2}


@pytest.fixture(scope="module")
def lists(site, tmp_path_factory) -> Path:
    """Three lists: pictures that come in another order than asked for, and some that do not."""
    folder = tmp_path_factory.mktemp("lists")
    urls = [url_of(site, f"/good/{n}?wait={(n * 7 % 5) / 50}") for n in range(16)]
    urls[3], urls[8] = url_of(site, "/nowhere"), url_of(site, "/page")
    captions = [f"a dog and {n} cats" for n in range(16)]
    pq.write_table(pa.table({"url": urls[:7], "caption": captions[:7]}), folder / "one.v2.parquet", row_group_size=2)
    with open(folder / "two.jsonl", "w") as file:
        for n in range(7, 11):
            file.write(json.dumps({"URL": urls[n], "TEXT": captions[n]}) + "\n")
        file.write("{broken\n")
    with open(folder / "three.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image_url", "alt"), *zip(urls[11:], captions[11:], strict=True)])
    (folder / "four.csv").write_text("url,caption\nfile:///x.jpg,nothing comes of this one\n")
    return folder


NAMES = "{one.v2.parquet,two.jsonl,three.csv,four.csv}"


@pytest.fixture(scope="module")
def fetched(cluster, lists):
    raw = f"{lists}/raw"
    return raw, fetch([f"{lists}/{NAMES}"], raw, Fetching(**QUICK, samples_per_shard=4))


def rows_in(raw: str) -> list[dict]:
    return [row for path in sorted(Path(raw, "fetched").iterdir()) for row in pq.read_table(path).to_pylist()]


def test_the_books_of_a_run_balance(fetched):
    raw, result = fetched
    dropped = {"http_status": 1, "not_a_picture": 1, "row_malformed": 1, "scheme_refused": 1}
    assert result == {"in": 18, "kept": 14, "dropped": dropped, "shards": 7}
    rows = rows_in(raw)
    assert Counter(row["reason"] for row in rows) == {None: 14, **dropped}
    assert all(row["status"] == 200 and row["bytes"] and row["seconds"] > 0 for row in rows if not row["reason"])
    for path in Path(raw, "markers").iterdir():
        marker = json.loads(path.read_text())
        assert marker["in"] == marker["kept"] + sum(marker["dropped"].values())


def test_shards_hold_what_came_in_the_order_of_the_list(fetched):
    raw, _ = fetched
    shards = find_shards([raw])
    assert [Path(path).name for path in shards] == [
        *("one_v2-00000.tar", "one_v2-00001.tar", "three-00000.tar", "three-00001.tar"),
        *("two-00000.tar",),  # two-00001 and four-00000 have no picture
    ]
    with tarfile.open(shards[0]) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    ends = [("jpg", "txt", "json"), ("png", "txt", "json"), ("jpg", "txt", "json")]
    assert list(members) == [f"one_v2-{n:09d}.{end}" for n, names in enumerate(ends) for end in names]
    facts = json.loads(members["one_v2-000000001.json"])
    assert facts.keys() == {"sha256", "url", "caption", "status", "final_url", "fetched"}
    assert facts["caption"] == members["one_v2-000000001.txt"].decode() == "a dog and 1 cats"
    assert members["one_v2-000000001.png"] == picture(1)
    assert [sample.key for sample in read_shard(shards[2])] == [f"three-{n:09d}" for n in range(4)]


def test_curation_goes_on_from_there(fetched, tmp_path):
    raw, _ = fetched
    manifest = curate([f"{raw}/*.tar"], f"{tmp_path}/pairs", Curation(deduplication=None))
    assert (manifest["in"], manifest["kept"]) == (14, 14)


def test_a_second_run_asks_nobody_and_other_settings_and_lists_are_refused(fetched, lists, site):
    raw, result = fetched
    settings = Fetching(**QUICK, samples_per_shard=4)
    begin = len(site.asked)
    assert fetch([f"{lists}/{NAMES}"], raw, settings) == result
    assert len(site.asked) == begin
    with pytest.raises(OwlError, match=r"other settings \(timeout 2.0 → 3.0\)"):
        fetch([f"{lists}/{NAMES}"], raw, settings.model_copy(update={"timeout": 3.0}))
    other = lists / "other"
    other.mkdir()
    (other / "four.csv").write_text("url,caption\nfile:///x.jpg,a\nfile:///y.jpg,b\n")
    with pytest.raises(OwlError, match=r"four-00000.json is of rows 0 to 1 of .*choose another folder"):
        fetch([f"{other}/four.csv"], raw, settings)


def test_an_outage_here_is_not_made_final(ask, tmp_path):
    part = Slice(f"{tmp_path}/list.csv", 0, 13)
    answers = ask(*(f"http://127.0.1.{n}:40009/x.jpg" for n in range(12)), "file:///x")
    with pytest.raises(OwlError, match="not one of the 12 hosts of list-00000 could be reached"):
        write_shard(f"{tmp_path}", "list-00000", part, answers, io.BytesIO())
    assert not (tmp_path / "markers").exists()
    assert len(rows_in(f"{tmp_path}")) == 13
    few = [answers[0], answers[-1]]
    marker = write_shard(f"{tmp_path}", "list-00000", Slice(part.path, 0, 2), few, io.BytesIO())
    assert marker["dropped"] == {"connection_failed": 1, "scheme_refused": 1}
    assert not (tmp_path / "list-00000.tar").exists()


@pytest.mark.slow
def test_killed_and_run_again_equals_undisturbed(cluster, site, tmp_path, monkeypatch, capsys):
    """kill -9 of the driver while shards are being fetched; the rerun fetches the rest, and only that."""
    urls = [url_of(site, f"/good/{n}?wait=0.03&killed") for n in range(60)]
    with open(tmp_path / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([("url", "caption"), *((url, f"a dog, {n}") for n, url in enumerate(urls))])
    changed = {**QUICK, "connections_per_host": 1, "processes": 1, "samples_per_shard": 6}
    options = [part for name, value in changed.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    command = ["curate", "fetch", f"{tmp_path}/list.csv", "--out", f"{tmp_path}/raw", *options]
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    killed = subprocess.Popen([sys.executable, "-m", "jobs.cli", *command], **quiet)
    markers = tmp_path / "raw/markers"
    deadline = time.time() + 60
    while time.time() < deadline and not (markers.exists() and any(markers.iterdir())):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = {path.stem for path in markers.glob("*.json")}
    assert 0 < len(done) < 10
    begin = len(site.asked)
    monkeypatch.setattr(sys, "argv", ["owl", *command, "--json"])
    monkeypatch.setattr("jobs.curation.ray_session", contextlib.nullcontext)  # on the Ray that the tests share
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out) == {
        "in": 60,
        "kept": 60,
        "dropped": {},
        "shards": 10,
        "out": f"{tmp_path}/raw",
    }
    samples = [sample for path in find_shards([f"{tmp_path}/raw"]) for sample in read_shard(path)]
    assert [sample.key for sample in samples] == [f"list-{n:09d}" for n in range(60)]
    assert [sample.images[0] for sample in samples] == [picture(n) for n in range(60)]
    asked = defaultdict(int)
    for _, _, path, _ in since(site, begin, "/good/"):
        asked[int(path.split("/")[2].split("?")[0]) // 6] += 1
    assert not {int(shard[-5:]) for shard in done} & asked.keys()
