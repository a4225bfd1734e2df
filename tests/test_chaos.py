"""Curation killed again and again, at random moments, on local disk and on an S3 server: what comes out is what an
undisturbed run gives, to the last row.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import psutil
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster
from s3_server import s3_server

from jobs.bench_curation_set import write_set
from pipelines import storage

pytestmark = pytest.mark.slow
KILLS = ["driver"] * 8 + ["worker"] * 8 + ["node"] * 6
SHARDS = 240


class Machines:
    """A Ray cluster of a head without CPUs and two nodes with one each, on this machine."""

    def __init__(self, environment: dict[str, str]):
        os.environ.update(environment)
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.head = self.cluster.head_node
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(2)]

    def kill_node(self, chance: random.Random) -> None:
        node = self.nodes.pop(chance.randrange(len(self.nodes)))
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.append(self.cluster.add_node(num_cpus=1))

    def kill_worker(self, chance: random.Random) -> bool:
        """Any task's or actor's process, but not a node's own agents, without which it ends itself."""
        raylets = [each.process.pid for node in (self.head, *self.nodes) for each in node.all_processes["raylet"]]
        family = [process for raylet in raylets for process in psutil.Process(raylet).children(recursive=True)]
        workers = [process for process in family if re.match(r"ray::(?!.*Agent)", "".join(process.cmdline()[:1]))]
        if workers:
            chance.choice(workers).kill()
        return bool(workers)


def start(raw: Path, out: str, environment: dict[str, str]) -> subprocess.Popen:
    """`max_tries` is raised, since a shard in work when a worker is killed here is not to blame for it."""
    command = [sys.executable, "-m", "jobs.cli", "curate", str(raw), "--out", out]
    command += ["--set", "pictures.short_side=64", "--set", "max_tries=20"]
    return subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.DEVNULL)


def contents(out: str, folder: str) -> dict:
    """Name → bytes of a file, or its rows."""
    fs, plain = storage.filesystem(f"{out}/{folder}")
    found = {}
    for path in fs.ls(plain, detail=False):
        with fs.open(path, "rb") as file:
            name = storage.name_of(path)
            found[name] = pq.read_table(file).to_pylist() if name.endswith(".parquet") else file.read()
    return found


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_killed_again_and_again_equals_undisturbed(where, tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    write_set(str(raw), SHARDS * 8, each=8)
    subprocess.run(["cp", raw / "web-00000.tar", raw / "web-copy.tar"], check=True)  # duplicates between shards
    environment = {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(Path(__file__).parents[1])}
    assert start(raw, f"{tmp_path}/calm", environment).wait() == 0
    if where == "disk":
        killed = disturbed(raw, f"{tmp_path}/out", environment)
        compare(f"{tmp_path}/calm", f"{tmp_path}/out")
        assert not list((tmp_path / "out").rglob("*.partial"))
    else:
        with s3_server(tmp_path / "s3") as server:
            for name, value in server.environment.items():
                monkeypatch.setenv(name, value)
            fsspec.filesystem("s3").mkdir("curated")
            killed = disturbed(raw, "s3://curated/out", environment | server.environment)
            compare(f"{tmp_path}/calm", "s3://curated/out")
    assert len(killed) >= 20, killed


def disturbed(raw: Path, out: str, environment: dict[str, str]) -> list[str]:
    """Runs the job to its end, and kills as it goes; returns what was killed when."""
    chance = random.Random(7)
    moments = sorted(chance.uniform(0, SHARDS) for _ in KILLS)
    kills = chance.sample(KILLS, len(KILLS))
    machines = Machines(environment)
    killed: list[str] = []
    try:
        environment = environment | {"RAY_ADDRESS": machines.cluster.address}
        driver = start(raw, out, environment)
        deadline = time.time() + 1500
        settling = 0
        while time.time() < deadline:
            done = len(storage.listing(f"{out}/markers", ".json"))
            if driver.poll() is not None:
                assert driver.returncode == 0, f"after {killed}"
                return killed
            if moments and done >= moments[0]:
                what = kills[len(moments) - 1]
                if what == "driver":
                    driver.send_signal(signal.SIGKILL)
                    driver.wait()
                    driver = start(raw, out, environment)
                elif what == "node":
                    machines.kill_node(chance)
                elif not machines.kill_worker(chance):
                    continue
                killed.append(f"{what} at {done}")
                print(f"killed a {killed[-1]}", flush=True)
                moments.pop(0)
            elif done == SHARDS + 1 and settling < 3:  # while duplicates are found and entered
                time.sleep(chance.uniform(0.2, 2))
                settling += 1
                if driver.poll() is None and not storage.exists(f"{out}/manifest.json"):
                    driver.send_signal(signal.SIGKILL)
                    driver.wait()
                    driver = start(raw, out, environment)
                    killed.append("driver while settling")
            time.sleep(0.1)
        raise TimeoutError(f"not done after {killed}")
    finally:
        if driver.poll() is None:
            driver.kill()
        machines.cluster.shutdown()


def compare(calm: str, out: str) -> None:
    for folder in ("shards", "thumbnails", "ledger", "selection"):
        wanted, found = contents(calm, folder), contents(out, folder)
        assert wanted.keys() == found.keys(), folder
        for name, value in wanted.items():
            assert found[name] == value, f"{folder}/{name}"
    wanted, found = (storage.read_json(f"{folder}/manifest.json") for folder in (calm, out))
    for name in ("in", "kept", "dropped", "shards", "set_aside"):
        assert wanted[name] == found[name], name
