"""Verbs as jobs on a cluster of three Ray nodes on this machine, of which one is lost during each: every job completes,
with the results of a run that nothing happened to. Real processes, real SIGKILLs."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from openai import OpenAI

from jobs.cluster import free_ports, session_of
from jobs.demo import put_together
from jobs.recipes import load
from jobs.world.shards import World, write_world
from pipelines.serving.keys import add_key

ROOT = Path(__file__).parents[1]
WORLD = World(pairs=600, instructions=200, texts=200, questions=60, shards=12, seed=3)


class Cluster:
    """What an operator types, and the hand that pulls a plug."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {"RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT)}
        self.environment.pop("RAY_ADDRESS", None)

    def owl(self, *arguments: str, address: str = "", check: bool = True) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "jobs.cli", *arguments]
        environment = self.environment | ({"RAY_ADDRESS": address} if address else {})
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert run.returncode == 0 or not check, f"{arguments}\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
        return run

    def up(self) -> None:
        ports = ("--port", "0", "--dashboard", "0")
        told = self.owl("cluster", "up", "--dir", str(self.folder), "--head-cpus", "1", *ports, "--json")
        self.address = json.loads(told.stdout.splitlines()[-1])["dashboard"]

    def down(self, *node: str) -> None:
        self.owl("cluster", "down", "--dir", str(self.folder), *node)

    def submit(self, *arguments: str) -> dict:
        told = self.owl("submit", *arguments, "--json", address=self.address)
        return json.loads(told.stdout.splitlines()[-1])

    def nodes(self) -> dict[str, int]:
        known = json.loads((self.folder / "cluster.json").read_text())
        return {name: known[name]["pid"] for name in known if name.startswith("node")}

    def busy(self, doing: str) -> str | None:
        """A node besides the head on which a Ray worker of that name is at work."""
        names = {pid: name for name, pid in self.nodes().items()}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if doing in "".join(process.cmdline()[:1]) and (name := names.get(session_of(process) or 0)):
                    return name
        return None

    @contextlib.contextmanager
    def losing_a_node(self, doing: str, after: float = 0, ready=lambda: True) -> Iterator[list[str]]:
        """While the block lasts, the node that is ``doing`` something is lost, once; afterwards there is another."""
        lost: list[str] = []
        ended = threading.Event()

        def wait() -> None:
            while not ended.wait(0.05):
                if ready() and (name := self.busy(doing)):
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


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Raw shards and an untrained Owl."""
    folder = tmp_path_factory.mktemp("made")
    for part in ("pairs", "instructions", "text", "heldout"):
        write_world(folder / "world", WORLD, part)
    return folder


@pytest.fixture(scope="module")
def three_nodes(tmp_path_factory):
    running = Cluster(tmp_path_factory.mktemp("cluster"))
    running.up()
    yield running
    running.down()


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


LOST_WHILE = {"pairs": "curate_shards", "stage1": "RayTrainWorker", "stage2": "RayTrainWorker", "eval": "Answerer"}
"""The verbs during which a node is lost, and the workers that it has to have then."""


@pytest.mark.slow
def test_a_node_is_lost_during_each_verb(three_nodes, made, tmp_path):
    for out in ("calm", "lossy"):
        (tmp_path / out).mkdir()
    text, tokenizer_text = f"{made}/world/raw/text", f"{made}/curated/text"
    three_nodes.owl("curate", text, "--out", tokenizer_text, "--recipe", "demo_small", "--set", "deduplication=null")
    owl = put_together(made, load("demo_small"))
    calm = the_way(made / "world", tmp_path / "calm", owl)
    lossy = the_way(made / "world", tmp_path / "lossy", owl)
    results = {}
    for verb, command in calm.items():
        results[verb] = json.loads(three_nodes.owl(*command).stdout.splitlines()[-1])
    for verb, command in lossy.items():
        job = ("--name", f"{tmp_path.name}-{verb}")
        if verb not in LOST_WHILE:
            three_nodes.submit(*job, *command)
            continue
        run = tmp_path / "lossy" / verb

        def begun(run: Path = run, trains: bool = verb.startswith("stage")) -> bool:
            return not trains or any(run.glob("checkpoints/checkpoint_*"))

        with three_nodes.losing_a_node(LOST_WHILE[verb], after=0.2, ready=begun):
            told = three_nodes.submit(*job, *command)
        same(verb, results[verb], told, tmp_path)
    listed = json.loads(three_nodes.owl("jobs", "--json", address=three_nodes.address).stdout.splitlines()[-1])
    assert all(job["status"] == "SUCCEEDED" for job in listed["jobs"] if job["job"].startswith(tmp_path.name))


def same(verb: str, calm: dict, lossy: dict, folder: Path) -> None:
    one, two = folder / "calm" / verb, folder / "lossy" / verb
    if verb == "pairs":
        assert all(calm[key] == lossy[key] for key in ("in", "kept", "dropped"))
        for path in sorted((one / "shards").iterdir()):
            assert filecmp.cmp(path, two / "shards" / path.name, shallow=False)
        for path in sorted((one / "ledger").iterdir()):
            assert pq.read_table(path).equals(pq.read_table(two / "ledger" / path.name))
    elif verb == "eval":
        assert calm["scores"] == lossy["scores"]
    else:
        logs = [json.loads((place / "log.json").read_text())["history"] for place in (one, two)]
        losses = [{entry["step"]: entry["loss"] for entry in log} for log in logs]
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.slow
def test_a_node_is_lost_under_an_endpoint(three_nodes, made, model_folder, tmp_path):
    """Deployed from a Serve config file by the dashboard; every request is answered."""
    keys = str(tmp_path / "keys.jsonl")
    secret = add_key(keys, "operator")
    (port,) = free_ports(1)
    serving = {"keys": keys, "min_replicas": 2, "max_replicas": 2, "cpus_per_replica": 1, "drain_seconds": 10}
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {"name": "owl", "route_prefix": "/", "import_path": "pipelines.serving.deploy:from_config",
             "args": {"model": model_folder, "serving": serving}}
        ],
    }  # fmt: skip
    (tmp_path / "endpoint.yaml").write_text(yaml.safe_dump(config))
    told = three_nodes.owl("serve", "--config", str(tmp_path / "endpoint.yaml"), address=three_nodes.address)
    assert f"http://127.0.0.1:{port}" in told.stderr
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=secret, max_retries=0, timeout=120)

    def answer() -> str:
        chat = client.chat.completions.create(
            model="owl",
            messages=[{"role": "user", "content": "what color is the circle ?"}],
            max_tokens=8,
            temperature=0,
        )
        return chat.choices[0].message.content or ""

    wanted, answers = answer(), []
    with three_nodes.losing_a_node("ServeReplica:owl:Engine") as lost:
        until = time.monotonic() + 60
        while time.monotonic() < until and not (lost and len(answers) > 40):
            answers.append(answer())
    assert len(answers) > 40
    assert set(answers) == {wanted}
