"""Pictures of raw tars over HTTP on loopback, for a rival that reads nothing but URLs; asyncio, from the files' pages.

    PYTHON picture_server.py RAW_FOLDER LIST

writes the Parquet file LIST (sample, url, caption; captions of fewer than three words are left out), prints the number
of its rows, serves until its standard input is closed, and then prints the CPU seconds that it took.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FEWEST = 3

Place = tuple[int, int, int]
"""Where a picture lies: an open file's number, the first byte, the number of bytes."""


class Pictures(asyncio.Protocol):
    """Answers one GET of /SAMPLE with that sample's picture, and hangs up. A KeyError for others closes it as well."""

    def __init__(self, places: dict[str, Place]) -> None:
        self.places = places

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        file, first, size = self.places[data.split(b" ", 2)[1].decode().removeprefix("/")]
        head = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % size
        self.transport.write(head + os.pread(file, size, first))
        self.transport.close()


def index(raw: str) -> tuple[dict[str, Place], dict[str, str]]:
    """The places and the captions of a folder's samples. The tars stay open."""
    places: dict[str, Place] = {}
    captions: dict[str, str] = {}
    for path in sorted(Path(raw).glob("*.tar")):
        file = os.open(path, os.O_RDONLY)
        with tarfile.open(path) as tar:
            for member in tar:
                sample, _, extension = member.name.partition(".")
                if extension == "jpg":
                    places[sample] = (file, member.offset_data, member.size)
                elif extension == "txt":
                    captions[sample] = os.pread(file, member.size, member.offset_data).decode()
    return places, captions


async def serve(raw: str, listed: str) -> None:
    """Serves until standard input is closed."""
    loop = asyncio.get_running_loop()
    places, captions = index(raw)
    server = await loop.create_server(lambda: Pictures(places), "127.0.0.1", 0, backlog=1024)
    port = server.sockets[0].getsockname()[1]
    samples = [sample for sample in places if len(captions.get(sample, "").split()) >= FEWEST]
    columns = {
        "sample": samples,
        "url": [f"http://127.0.0.1:{port}/{sample}" for sample in samples],
        "caption": [captions[sample] for sample in samples],
    }
    pq.write_table(pa.table(columns), listed)
    print(len(samples), flush=True)
    closed = asyncio.Event()
    loop.add_reader(sys.stdin, closed.set)
    await closed.wait()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
    print(time.process_time())
