# ruff: noqa: E501 (a table of bodies reads better in lines)
"""Requests that mean harm: each a body or a picture, and the statuses that are right for it."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image


class Request(NamedTuple):
    kind: str
    method: str
    path: str
    body: bytes
    right: tuple[int, ...]
    headers: dict[str, str] = {}


CHAT = "/v1/chat/completions"


def requests(count: int, seed: int = 0) -> Iterator[Request]:
    """Of every kind in turn, each time another one."""
    draw = random.Random(seed)
    kinds = (bombs, broken_pictures, addresses, wrong_types, huge_counts, odd_encodings, deep_json, headers, methods)
    for number in range(count):
        yield kinds[number % len(kinds)](draw)


def post(kind: str, body: bytes | dict, *right: int, path: str = CHAT, **headers: str) -> Request:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Request(kind, "POST", path, data, right or (400,), {"content-type": "application/json", **headers})


def showing(url: object) -> dict:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"model": "owl", "max_tokens": 1, "messages": [{"role": "user", "content": [part]}]}


def uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture(kind: str, data: bytes) -> Request:
    return post(kind, showing(uri(data)))


# --- pictures --------------------------------------------------------------------------------------------------------


def png_of(width: int, height: int, rows: int = 1) -> bytes:
    """A PNG that declares a size, and holds some black rows of it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    raw = zlib.compress(bytes((width + 1) * min(rows, height)))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", raw) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bombs(draw: random.Random) -> Request:
    side = draw.randint(6000, 40_000)
    return draw.choice(
        (
            lambda: picture("bomb", png_of(side, side, 200)),
            lambda: picture("bomb", png_of(2**31 - 1, 2**31 - 1)),
            lambda: picture("bomb: sides", png_of(draw.randint(16_385, 200_000), draw.randint(1, 100))),
            lambda: picture("bomb: ratio", png_of(draw.randint(2, 8), draw.randint(2000, 3000))),
            lambda: picture("bomb: one pixel", png_of(1, 1)),
            lambda: picture("bomb: text", text_bomb()),
            lambda: picture("bomb: frames", animation("GIF")),
            lambda: picture("bomb: frames", animation("WEBP")),
            lambda: picture("bomb: frames", animation("PNG")),
        )
    )()


@lru_cache
def text_bomb() -> bytes:
    """A PNG whose compressed comment is 200 MB of zeros."""
    data = png_of(40, 40, 40)
    deflate = zlib.compressobj(9)
    comment = b"c\0\0" + b"".join(deflate.compress(bytes(1 << 20)) for _ in range(200)) + deflate.flush()
    chunk = struct.pack(">I", len(comment)) + b"zTXt" + comment + struct.pack(">I", zlib.crc32(b"zTXt" + comment))
    return data[:33] + chunk + data[33:]


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (20, 20), (80 * n, 0, 0)) for n in range(3)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


def broken_pictures(draw: random.Random) -> Request:
    noise = Image.fromarray(np.random.default_rng(draw.getrandbits(30)).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    whole = {kind: saved(noise, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF")}
    kind = draw.choice(list(whole))
    data = whole[kind]
    return draw.choice(
        (
            lambda: picture("cut short", data[: draw.randint(1, len(data) // 2)]),
            lambda: picture("noise", draw.randbytes(draw.randint(0, 5000))),
            lambda: picture("another format", saved(noise, draw.choice(("BMP", "TIFF", "ICO", "PPM", "TGA")))),
            lambda: picture("a document", b"%PDF-1.7\n" + draw.randbytes(200)),
            lambda: picture(
                "a document", b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"
            ),
            lambda: picture("magic alone", data[:12]),
            lambda: Request("upload", "POST", "/v1/files", upload(draw.randbytes(300)), (400,), MULTIPART),
            lambda: Request("upload", "POST", "/v1/files", upload(data, "purpose", "assistants"), (400,), MULTIPART),
            lambda: Request("upload", "POST", "/v1/files", b"--b\r\nbroken", (400,), MULTIPART),
        )
    )()


MULTIPART = {"content-type": "multipart/form-data; boundary=b"}


def upload(data: bytes, name: str = "purpose", value: str = "vision") -> bytes:
    form = f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
    file = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="../../a.png"\r\nContent-Type: image/png\r\n\r\n'
    )
    return form + file + data + b"\r\n--b--\r\n"


def addresses(draw: random.Random) -> Request:
    """Of this machine, its network and its cloud, in disguise; pictures.example is allowed."""
    host = draw.choice(
        (
            "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0x7f.0.0.1", "[::1]", "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]", "localhost", "LOCALHOST.", "169.254.169.254", "[fd00:ec2::254]", "10.0.0.1", "192.168.1.1",
            "0.0.0.0", "0", "①②⑦.⓪.⓪.①", "127.0.0.1.nip.io", "pictures.example@127.0.0.1", "127.0.0.1\\@pictures.example",
            "127.0.0.1#@pictures.example", "pictures.example.evil.test", "[64:ff9b::7f00:1]", "metadata.google.internal",
            "pictures.example:22", "user:secret@pictures.example", "localhost:8265",
        )
    )  # fmt: skip
    scheme = draw.choice(
        ("http://", "https://", "https://", "HTTPS://", "ftp://", "file://", "gopher://", "//", "https:\\\\")
    )
    return post("address", showing(f"{scheme}{host}/{draw.randint(0, 999)}.png"))


# --- bodies ----------------------------------------------------------------------------------------------------------


def hello(**fields) -> dict:
    return {"model": "owl", "max_tokens": 1, "messages": [{"role": "user", "content": "hello"}], **fields}


def wrong_types(draw: random.Random) -> Request:
    odd = draw.choice(([], {}, "x", -1, 1e308, [[]], {"a": 1}, 10**30, False, "\0", "1"))
    name = draw.choice(
        ("messages", "max_tokens", "temperature", "top_p", "top_k", "n", "seed", "stop", "stream", "stream_options",
         "response_format", "logprobs", "top_logprobs", "presence_penalty", "model", "receipt", "cache_salt")
    )  # fmt: skip
    fine = {"stop": ([], "x", "\0", "1"), "cache_salt": ("x", "\0", "1"), "seed": (-1,), "model": ()}
    fine |= {
        "stream": (False,),
        "logprobs": (False,),
        "receipt": (False,),
        "presence_penalty": (-1,),
        "stream_options": ({},),
    }
    if any(odd == value and type(odd) is type(value) for value in fine.get(name, ())):
        odd = None if name == "messages" else [None]
    return post("wrong type", hello(**{name: odd}), 404 if name == "model" and isinstance(odd, str) else 400)


def huge_counts(draw: random.Random) -> Request:
    tiny = uri(png_of(8, 8, 8))
    pictures = [{"type": "image_url", "image_url": {"url": tiny}}] * draw.randint(17, 300)
    return draw.choice(
        (
            lambda: post("many choices", hello(n=draw.randint(17, 10**9))),
            lambda: post("many tokens", hello(max_tokens=draw.randint(65_537, 10**12))),
            lambda: post("many stops", hello(stop=["x"] * draw.randint(5, 5000))),
            lambda: post("many pictures", hello(messages=[{"role": "user", "content": pictures}])),
            lambda: post("many messages", hello(messages=[{"role": "user", "content": "a"}] * 5000)),
            lambda: post("a long text", hello(messages=[{"role": "user", "content": "word " * draw.randint(5000, 50_000)}])),
            lambda: post("many fields", hello(**{f"field{n}": n for n in range(draw.randint(1, 3000))})),
            lambda: post("many prompts", {"model": "owl", "prompt": ["a"] * 1000, "max_tokens": 1}, path="/v1/completions"),
            lambda: post("ids that are none", {"model": "owl", "prompt": [10**9, -5], "max_tokens": 1}, path="/v1/completions"),
            lambda: post("frames", hello(messages=[{"role": "user", "content": [{"type": "video_url", "video_url": {
                "url": "data:video/jpeg;base64," + "QUJD," * draw.randint(20, 5000)}}]}])),
            lambda: post("a schema that grows", hello(response_format={"type": "json_schema", "json_schema": {
                "name": "s", "schema": {"type": "string", "pattern": "(a{1,9999}){1,9999}" * 3}}})),
            lambda: post("a large body", b"[" + b"1," * 3_000_000 + b"1]", 400, 413),
        )
    )()  # fmt: skip


def odd_encodings(draw: random.Random) -> Request:
    text = json.dumps(hello())
    return draw.choice(
        (
            lambda: post("bytes", draw.randbytes(draw.randint(1, 2000))),
            lambda: post("UTF-16", text.encode("utf-16"), 200, 400),
            lambda: post("half a surrogate", hello(model="\ud800"), 400, 404),
            lambda: post("half a surrogate", text.replace("hello", "\\ud83d").encode(), 200, 400),
            lambda: post("half a surrogate", text.replace("max_tokens", "\\udc00").encode()),
            lambda: post("not UTF-8", text.replace("hello", "h\xe9llo").encode("latin-1")),
            lambda: post("NaN", text.replace("1,", "NaN,", 1).encode()),
            lambda: post("infinity", text.replace("1,", "1e999,", 1).encode()),
            lambda: post("a long number", text.replace("1,", "9" * 50_000 + ",", 1).encode()),
            lambda: post("twice", text.replace("{", '{"max_tokens": "x", "max_tokens": [], ', 1).replace('"max_tokens": 1', '"n": 1').encode()),
            lambda: post("half", text[: draw.randint(1, len(text) - 1)].encode()),
            lambda: post("nothing", b""),
            lambda: post("another type", text.encode(), 400, 415, **{"content-type": "text/plain"}),
            lambda: post("compressed", zlib.compress(text.encode()), 400, 415, **{"content-encoding": "deflate"}),
            lambda: post("base64 that is none", showing("data:image/png;base64," + "é" * draw.randint(1, 50))),
            lambda: post("base64 that is none", showing("data:image/png;base64,=" + "A" * draw.randint(1, 50))),
            lambda: post("no base64", showing("data:image/png,%89PNG")),
            lambda: post("a page", showing("data:text/html;base64,PGI+")),
        )
    )()  # fmt: skip


def deep_json(draw: random.Random) -> Request:
    depth = draw.choice((600, 5000, 100_000))
    return draw.choice(
        (
            lambda: post("depth", b"[" * depth),
            lambda: post("depth", b"[" * depth + b"]" * depth),
            lambda: post("depth", b'{"a":' * depth + b"1" + b"}" * depth),
            lambda: post("depth", json.dumps(hello()).replace('"hello"', "[" * depth + "]" * depth).encode()),
            lambda: post("depth", json.dumps(hello(response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": 7}}))
                .replace("7", '{"items":' * depth + "{}" + "}" * depth).encode()),
        )
    )()  # fmt: skip


def headers(draw: random.Random) -> Request:
    text = json.dumps(hello()).encode()
    return draw.choice(
        (
            lambda: post("many headers", text, 400, 431, **{f"x-{n}": "y" * 100 for n in range(1500)}),
            lambda: post("a long header", text, 400, 431, **{"x-long": "y" * 200_000}),
            lambda: post("a wrong key", text, 401, authorization="Bearer " + "x" * draw.randint(0, 5000)),
            lambda: post("a wrong key", text, 401, authorization=draw.choice(("Basic b3dsOm93bA==", "Bearer", "\x01", "x"))),
            lambda: post("an id", b"{}", 400, **{"x-request-id": "a" * 5000}),
        )
    )()  # fmt: skip


def methods(draw: random.Random) -> Request:
    method = draw.choice(("GET", "PUT", "DELETE", "PATCH", "TRACE", "OPTIONS"))
    path = draw.choice((CHAT, "/v1/completions", "/tokenize"))
    other = draw.choice(
        ("/v1/../../etc/passwd", "/v1/files/..%2f..%2fkeys", "/v1/models/" + "a" * 3000, "/%00", "/v1/files/file-" + "0" * 64,
         "//evil.test/", "/v1/models/%ff%fe", "/.env", "/api/jobs/", "/invocations")
    )  # fmt: skip
    if draw.random() < 0.5:
        return Request("another method", method, path, b"", (405,))
    return Request("a path", "GET", other, b"", (404,))
