"""Pictures of a request: data: URIs only, with caps on bytes and pixels before anything is decoded."""

from __future__ import annotations

import base64
import binascii

from owl_model.images import ImageError, open_header
from pipelines.serving.api import ImagePart, Message

MAX_BYTES = 20_000_000
MAX_PICTURES = 16
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")


class MediaError(ValueError):
    """A picture of a request is refused. The message never repeats what a decoder said."""


def split_media(messages: list[Message]) -> tuple[list[dict], list[bytes]]:
    """OpenAI messages → messages with bare image parts, and the pictures' bytes in reading order."""
    plain: list[dict] = []
    pictures: list[bytes] = []
    for message in messages:
        if isinstance(message.content, str):
            plain.append({"role": message.role, "content": message.content})
            continue
        parts: list[dict] = []
        for part in message.content:
            if isinstance(part, ImagePart):
                pictures.append(read_data_uri(part.image_url.url))
                parts.append({"type": "image"})
            else:
                parts.append({"type": "text", "text": part.text})
        plain.append({"role": message.role, "content": parts})
    if len(pictures) > MAX_PICTURES:
        raise MediaError(f"{len(pictures)} pictures in one request; at most {MAX_PICTURES} are taken")
    return plain, pictures


def read_data_uri(url: str) -> bytes:
    head, _, body = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise MediaError("image_url must be a data: URI with base64 content; addresses are not fetched")
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise MediaError(f"a picture is larger than {MAX_BYTES} bytes")
    try:
        data = base64.b64decode(body, validate=True)
        header = open_header(data)
    except (binascii.Error, ImageError):
        raise MediaError("a picture cannot be decoded, or is too large") from None
    if header.format not in FORMATS:
        raise MediaError(f"pictures must be {', '.join(FORMATS)}")
    return data
