"""Where a request's pictures come from: its own data: URIs, uploads, and, of hosts that are allowed, the web."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import numpy as np
from yarl import URL

from pipelines.fetching.politeness import AddressRefused, Manners, Unfetched, checked, public_socket
from pipelines.serving.api import ImagePart, Message, Refusal, TextPart, Upload, VideoPart
from pipelines.serving.decoding import Decoders, Undecodable
from pipelines.serving.engine import Picture
from pipelines.serving.keys import Key
from pipelines.serving.options import Media
from pipelines.serving.shared import Recent, Shared, There


def plain(messages: Sequence[Message]) -> list[dict]:
    """A conversation as owl_model/chat.py takes it; pictures and videos are bare parts."""
    found = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            content: Any = message.content
        else:
            content = [
                {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": part.type[:5]}
                for part in message.content
            ]
        found.append({"role": role, "content": content})
    return found


class Pictures:
    """Those of requests, decoded."""

    def __init__(self, settings: Media, processor: Any, shared: Shared | There):
        """``processor`` is an OwlProcessor."""
        self.settings, self.processor, self.shared = settings, processor, shared
        self.decoders = Decoders(
            processor.image_processor, settings.decoders, settings.decoder_megabytes, settings.max_pixels
        )
        self.known = Recent(settings.kept_megabytes << 20)
        self.web: aiohttp.ClientSession | None = None

    async def of(self, messages: Sequence[Message], key: Key) -> list[Picture]:
        """All pictures and videos of a conversation, in reading order. Raises Refusal, which names the part."""
        parts = [
            (f"messages.{number}.content.{place}.{part.type}.url", part)
            for number, message in enumerate(messages)
            if not isinstance(message.content, str)
            for place, part in enumerate(message.content)
            if not isinstance(part, TextPart)
        ]
        count = sum(1 if isinstance(part, ImagePart) else part.video_url.url.count(",") for _, part in parts)
        if count > self.settings.max_pictures:
            raise Refusal(400, f"the request has {count} pictures; at most {self.settings.max_pictures} are taken")
        return list(await asyncio.gather(*(self.part(param, part, key) for param, part in parts)))

    async def part(self, param: str, part: ImagePart | VideoPart, key: Key) -> Picture:
        try:
            if isinstance(part, VideoPart):
                return await self.video(part.video_url.url)
            url = part.image_url.url
            if url.startswith("file-"):
                found = await self.shared.upload(key.name, url)
                if found is None:
                    raise Refusal(404, "there is no such upload, or no longer; upload it again", param)
                return found[1]
            return await self.picture(self.data_uri(url) if url.startswith("data:") else await self.fetched(url))
        except Undecodable as problem:
            raise Refusal(400, str(problem), param) from None

    def data_uri(self, url: str) -> bytes:
        head, comma, body = url.partition(",")
        if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
            raise Undecodable("a picture must be a data:image/…;base64, URI")
        return self.base64(body)

    def base64(self, body: str) -> bytes:
        if len(body) > self.settings.max_bytes * 4 // 3 + 4:
            raise Undecodable(f"a picture has more than {self.settings.max_bytes} bytes")
        try:
            return base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError):
            raise Undecodable("a picture's base64 cannot be read") from None

    async def picture(self, data: bytes) -> Picture:
        name = hashlib.sha256(data).digest()
        found = self.known.get(name)
        if found is None:
            pixels = await self.decoders.pixels(data, self.settings.seconds)
            found = Picture(hashlib.sha256(pixels.tobytes()).hexdigest(), pixels)
            self.known.put(name, found, pixels.nbytes)
        return found

    async def video(self, url: str) -> Picture:
        head, _, body = url.partition(",")
        if not head.startswith("data:video/jpeg;base64"):
            raise Undecodable("a video must be a data:video/jpeg;base64, URI of its frames, with commas between")
        from owl_model.images import spread_frames

        frames = [self.base64(frame) for frame in body.split(",")]
        chosen = [frames[index] for index in spread_frames(len(frames), self.processor.frames)]
        shown = await asyncio.gather(*(self.picture(frame) for frame in chosen))
        pixels = np.stack([frame.pixels for frame in shown])
        return Picture(hashlib.sha256(b"video" + pixels.tobytes()).hexdigest(), pixels)

    async def upload(self, data: bytes, filename: str, key: Key) -> Upload:
        """Keeps a picture; its id is made of what it holds. Raises Refusal."""
        if len(data) > self.settings.max_bytes:
            raise Refusal(413, f"a picture has more than {self.settings.max_bytes} bytes", "file")
        try:
            picture = await self.picture(data)
        except Undecodable as problem:
            raise Refusal(400, str(problem), "file") from None
        name = f"file-{hashlib.sha256(data).hexdigest()}"
        facts = Upload(id=name, bytes=len(data), created_at=int(time.time()), filename=filename[:200])
        await self.shared.keep_upload(key.name, name, facts.model_dump(), picture)
        return facts

    # --- the web -----------------------------------------------------------------------------------------------------

    async def fetched(self, url: str) -> bytes:
        """A picture of an allowed host: https, no redirects, a public address that is the one connected to, in so
        many bytes and seconds. Raises Undecodable, which tells nothing of what was met."""
        if not self.settings.hosts:
            raise Undecodable("a picture must be a data: URI or an upload; addresses are not fetched here")
        try:
            address = checked(URL(url), FETCHING)
        except (ValueError, Unfetched):
            raise Undecodable("this address is not one of those that pictures are fetched from") from None
        if address.scheme != "https" or not self.allowed(address.raw_host or ""):
            raise Undecodable("this address is not one of those that pictures are fetched from")
        try:
            async with asyncio.timeout(self.settings.seconds):
                return await self.read(address)
        except (aiohttp.ClientError, AddressRefused, OSError, TimeoutError, ValueError):
            raise Undecodable("the picture could not be fetched") from None

    def allowed(self, host: str) -> bool:
        host = host.lower().rstrip(".")
        return any(host == name or (name.startswith(".") and host.endswith(name)) for name in self.settings.hosts)

    async def read(self, address: URL) -> bytes:
        if self.web is None:
            connector = aiohttp.TCPConnector(socket_factory=public_socket, use_dns_cache=False, limit=32)
            self.web = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
            )
        async with self.web.get(address, allow_redirects=False) as reply:
            if reply.status != 200:
                raise ValueError("no picture")
            data = await reply.content.read(self.settings.max_bytes + 1)
            while len(data) <= self.settings.max_bytes and (more := await reply.content.read(1 << 16)):
                data += more
        if len(data) > self.settings.max_bytes:
            raise ValueError("too large")
        return data

    async def close(self) -> None:
        await self.decoders.close()
        if self.web is not None:
            await self.web.close()


FETCHING = Manners()
