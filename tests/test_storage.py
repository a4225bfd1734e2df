"""Files that appear whole or not at all, on disk and on a real S3 server; and curation from and to it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest
from s3_server import s3_bucket

from jobs.world.shards import World, write_world
from pipelines import storage

RAY = {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(Path(__file__).parents[1])}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with s3_bucket(tmp_path_factory.mktemp("s3"), "files") as running:
        yield running


def never_half_there(folder: str) -> None:
    path = f"{folder}/a/b.bin"

    def write_half() -> None:
        with storage.open_write(path) as file:
            file.write(b"x" * (12 << 20))  # more than one part of an upload
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        write_half()
    assert not storage.exists(path)
    assert storage.listing(f"{folder}/a", ".bin") == []
    with storage.open_write(path) as file:
        file.write(b"y" * (12 << 20))
    with storage.open_read(path) as file:
        assert file.read() == b"y" * (12 << 20)
    assert storage.listing(f"{folder}/a", ".bin") == [path]
    storage.remove(path)
    assert not storage.exists(path)


def test_a_file_is_never_half_there_on_disk(tmp_path):
    never_half_there(str(tmp_path))
    assert list(tmp_path.rglob("*.partial")) == []


def test_what_killed_writers_left_is_swept(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / ".a.arrow.123.partial").write_bytes(b"half")
    (tmp_path / "shards" / "b.arrow").write_bytes(b"whole")
    storage.sweep(str(tmp_path))
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["b.arrow"]


def test_a_file_is_never_half_there_on_s3(server):
    never_half_there("s3://files/whole")


@pytest.mark.slow
def test_curation_from_and_to_s3_outlives_an_outage(server, tmp_path):
    """The server's storage goes away for some seconds in the middle: requests are tried again."""
    write_world(tmp_path, World(pairs=900, shards=30, seed=4), "pairs")
    fs = fsspec.filesystem("s3")
    fs.put(f"{tmp_path}/raw/pairs", "files/raw", recursive=True)
    run = [sys.executable, "-m", "jobs.cli", "curate", "--json"]
    environment = os.environ | RAY | server.environment
    here = [*run, f"{tmp_path}/raw/pairs", "--out", f"{tmp_path}/out"]
    there = [*run, "s3://files/raw", "--out", "s3://files/out"]
    wanted = subprocess.run(here, env=environment, capture_output=True, text=True, check=True)

    def outage() -> None:
        while not storage.listing("s3://files/out/markers", ".json"):
            time.sleep(0.05)
        server.stop("object")
        time.sleep(2)
        server.start("object")

    breaker = threading.Thread(target=outage)
    breaker.start()
    found = subprocess.run(there, env=environment, capture_output=True, text=True)
    breaker.join()
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.partition('"out"')[0] == wanted.stdout.partition('"out"')[0]


def test_wrong_credentials_are_one_sentence(server, tmp_path):
    environment = os.environ | RAY | server.environment | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    command = [sys.executable, "-m", "jobs.cli", "curate", "s3://files/raw", "--out", f"{tmp_path}/out"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert "s3://files/raw" in found.stderr
