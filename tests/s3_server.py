"""A real S3 server for tests: one node of OpenStack Swift with its S3 API, on loopback, as processes of its own.

`make s3-server` installs it into .s3; tests that need it skip where it is not there.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from s3fs import S3FileSystem

PLACE = Path(__file__).parents[1] / ".s3"
SERVERS = ("account", "container", "object")

STORAGE = """[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
devices = {folder}/node
mount_check = false
workers = 0
disable_fallocate = true
log_level = WARNING
log_address = /dev/null
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""
BARE = ("catch_errors", "gatekeeper", "healthcheck", "listing_formats", "bulk", "slo", "dlo", "symlink")
"""Filters without settings."""
PIPELINE = (
    "catch_errors gatekeeper healthcheck cache listing_formats bulk s3api tempauth slo dlo versioned_writes symlink"
)
PROXY = """[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
workers = 0
log_level = WARNING
log_address = /dev/null
[pipeline:main]
pipeline = {pipeline} proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{memcache}
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = us-east-1
check_bucket_owner = false
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin .reseller_admin
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_object_versioning = true
""" + "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n" for name in BARE)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Server:
    def __init__(self, folder: Path):
        if not (PLACE / "bin/swift-proxy-server").exists():
            pytest.skip("no S3 server: make s3-server installs one")
        self.folder = folder
        *storage, self.port, memcache = free_ports(5)
        (folder / "node/sda").mkdir(parents=True)
        (folder / "swift.conf").write_text(
            "[swift-hash]\nswift_hash_path_suffix = owl\nswift_hash_path_prefix = owl\n"
            "[storage-policy:0]\nname = gold\ndefault = yes\npolicy_type = replication\n"
        )
        for name, port in zip(SERVERS, storage, strict=True):
            (folder / f"{name}.conf").write_text(STORAGE.format(port=port, folder=folder, name=name))
            builder = [PLACE / "bin/swift-ring-builder", folder / f"{name}.builder"]
            for command in (["create", "4", "1", "0"], ["add", f"r1z1-127.0.0.1:{port}/sda", "1"], ["rebalance"]):
                subprocess.run([*builder, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        (folder / "proxy.conf").write_text(
            PROXY.format(port=self.port, folder=folder, memcache=memcache, pipeline=PIPELINE)
        )
        self.processes: dict[str, subprocess.Popen] = {}
        for name in (*SERVERS, "proxy"):
            self.start(name)
        self.wait()

    def start(self, name: str) -> None:
        """One of account, container, object and proxy."""
        environment = os.environ | {"SWIFT_DIR": str(self.folder), "PYTHONWARNINGS": "ignore", "EVENTLET_HUB": "poll"}
        with open(self.folder / f"{name}.log", "ab") as log:
            command = [PLACE / f"bin/swift-{name}-server", self.folder / f"{name}.conf"]
            self.processes[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def stop(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()

    def wait(self) -> None:
        for _ in range(300):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/healthcheck", timeout=5).read()
                return
            time.sleep(0.1)
        raise TimeoutError(f"the S3 server did not come up; see {self.folder}")

    @property
    def environment(self) -> dict[str, str]:
        """What makes s3:// mean this server, for fsspec, pyarrow and whatever else follows AWS's names."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test:tester",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[Server]:
    """Skips the test where the server is not installed. Ends its processes afterwards."""
    server = Server(folder)
    S3FileSystem.clear_instance_cache()  # one made for a server before this one would go on asking that one
    try:
        yield server
    finally:
        for name in server.processes:
            server.stop(name)


@contextlib.contextmanager
def s3_bucket(folder: Path, name: str) -> Iterator[Server]:
    """A server that has a bucket, and this process's s3:// for as long."""
    with s3_server(folder) as running, pytest.MonkeyPatch.context() as patch:
        for variable, value in running.environment.items():
            patch.setenv(variable, value)
        fsspec.filesystem("s3").mkdir(name)
        yield running
