"""A cluster of several Ray nodes on this machine, as an operator has it, and what jobs there work on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import yaml

from jobs.cluster import free_ports, session_of
from jobs.world.shards import World, write_world
from pipelines.serving.keys import add_key

ROOT = Path(__file__).parents[1]


class Cluster:
    """What an operator types, and the hand that pulls a plug."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {"RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT)}
        self.environment.pop("RAY_ADDRESS", None)
        self.port = 0
        """Of its endpoints, once there is one: Serve keeps it."""

    def owl(self, *arguments: str, address: str = "", check: bool = True) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "jobs.cli", *arguments]
        environment = self.environment | ({"RAY_ADDRESS": address} if address else {})
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert run.returncode == 0 or not check, f"{arguments}\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
        return run

    def up(self, *options: str) -> None:
        options = ("--head-cpus", "1", "--port", "0", "--dashboard", "0", *options)
        told = self.owl("cluster", "up", "--dir", str(self.folder), *options, "--json")
        self.address = json.loads(told.stdout.splitlines()[-1])["dashboard"]

    def watch(self) -> str:
        """Prometheus' address."""
        told = self.owl("cluster", "watch", "--dir", str(self.folder), "--port", "0")
        return re.search(r"http://127\.0\.0\.1:\d+", told.stdout + told.stderr)[0]

    def down(self, *node: str) -> None:
        self.owl("cluster", "down", "--dir", str(self.folder), *node)

    def submit(self, *arguments: str) -> dict:
        told = self.owl("submit", *arguments, address=self.address)
        return json.loads(told.stdout.splitlines()[-1])

    def nodes(self) -> dict[str, int]:
        known = json.loads((self.folder / "cluster.json").read_text())
        return {name: known[name]["pid"] for name in known if name.startswith("node")}

    def workers(self, doing: str) -> Iterator[tuple[psutil.Process, str]]:
        """The Ray workers of that name that are at work on nodes besides the head, and their nodes."""
        names = {pid: name for name, pid in self.nodes().items()}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if doing in "".join(process.cmdline()[:1]) and (name := names.get(session_of(process) or 0)):
                    yield process, name

    @contextlib.contextmanager
    def losing_a_node(self, doing: str, after: float = 0, ready=lambda: True) -> Iterator[list[str]]:
        """While the block lasts, the node that is ``doing`` something is lost, once; afterwards there is another."""
        lost: list[str] = []
        ended = threading.Event()

        def wait() -> None:
            while not ended.wait(0.05):
                if ready() and (found := next(self.workers(doing), None)):
                    name = found[1]
                    ended.wait(after)
                    self.down("--node", name)
                    lost.append(name)
                    return

        thread = threading.Thread(target=wait)
        thread.start()
        try:
            yield lost
        finally:
            ended.set()
            thread.join()
        assert lost, f"no node was {doing}"
        self.up()


def write_raw(folder: Path, world: World) -> Path:
    for part in ("pairs", "instructions", "text", "heldout"):
        write_world(folder / "world", world, part)
    return folder / "world"


def the_way(raw: Path, out: Path, owl: str) -> dict[str, list[str]]:
    """Each verb of the way from raw shards to scores, in ``out``."""
    recipe = ["--recipe", "demo_small", "--json"]
    plain = ["--set", "deduplication=null"]
    training = ["--set", "workers=2", "--set", "steps=40", "--set", "checkpoint_every=10"]
    instructions = ["--data", f"{out}/instructions"]
    stage1, stage2 = f"{out}/stage1", f"{out}/stage2"
    asked = ["--benchmark", "picture_world", "--data", f"{raw}/heldout"]
    return {
        "pairs": ["curate", f"{raw}/raw/pairs", "--out", f"{out}/pairs", *recipe],
        "instructions": ["curate", f"{raw}/raw/instructions", "--out", f"{out}/instructions", *plain, *recipe],
        "text": ["curate", f"{raw}/raw/text", "--out", f"{out}/text", *plain, *recipe],
        "stage1": ["train", "stage1", "--data", f"{out}/pairs", "--start", owl, "--run", stage1, *training, *recipe],
        "stage2": ["train", "stage2", *instructions, "--start", stage1, "--run", stage2, *training, *recipe],
        "eval": ["eval", f"{stage2}/model", *asked, "--out", f"{out}/eval", *recipe],
    }


def deploy(cluster: Cluster, folder: Path, model: str, **serving) -> tuple[str, str]:
    """An endpoint from a Serve config file, by the dashboard; its address and a key."""
    keys = str(folder / "keys.jsonl")
    secret = add_key(keys, "operator")
    port = cluster.port = cluster.port or free_ports(1)[0]
    config = config_of(port, model, keys=keys, **serving)
    (folder / "endpoint.yaml").write_text(yaml.safe_dump(config))
    told = cluster.owl("serve", "--config", str(folder / "endpoint.yaml"), address=cluster.address)
    address = f"http://127.0.0.1:{port}"
    assert address in told.stderr
    return address, secret


def config_of(port: int, model: str, **serving) -> dict:
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "owl",
                "route_prefix": "/",
                "import_path": "pipelines.serving.deploy:from_config",
                "args": {"model": model, "serving": {"cpus_per_replica": 1, **serving}},
            }
        ],
    }
