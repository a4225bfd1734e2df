"""Verbs as jobs on a cluster of three Ray nodes on this machine, of which one is lost during each: every job completes,
with the results of a run that nothing happened to. Real processes, real SIGKILLs."""

from __future__ import annotations

import filecmp
import json
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import pyarrow.parquet as pq
import pytest
from local_cluster import Cluster, deploy, the_way, write_raw
from openai import OpenAI

from jobs.demo import put_together
from jobs.recipes import load
from jobs.world.shards import World

WORLD = World(pairs=600, instructions=200, texts=200, questions=60, shards=12, seed=3)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_raw(tmp_path_factory.mktemp("made"), WORLD)


@pytest.fixture(scope="module")
def three_nodes(tmp_path_factory):
    running = Cluster(tmp_path_factory.mktemp("cluster"))
    running.up()
    yield running
    running.down()


LOST_WHILE = {"pairs": "curate_shards", "stage1": "RayTrainWorker", "stage2": "RayTrainWorker", "eval": "Answerer"}
"""The verbs during which a node is lost, and the workers that it has to have then."""


@pytest.mark.slow
def test_a_node_is_lost_during_each_verb(three_nodes, raw, tmp_path):
    for out in ("calm", "lossy"):
        (tmp_path / out).mkdir()
    text = ("--out", f"{raw.parent}/curated/text", "--recipe", "demo_small", "--set", "deduplication=null")
    three_nodes.owl("curate", f"{raw}/raw/text", *text)  # what the tokenizer learns from
    owl = put_together(raw.parent, load("demo_small"))
    calm, lossy = the_way(raw, tmp_path / "calm", owl), the_way(raw, tmp_path / "lossy", owl)
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


def asker(address: str, secret: str) -> Callable[[], str]:
    client = OpenAI(base_url=f"{address}/v1", api_key=secret, max_retries=0, timeout=120)
    messages = [{"role": "user", "content": "what color is the circle ?"}]

    def answer() -> str:
        chat = client.chat.completions.create(model="owl", messages=messages, max_tokens=8, temperature=0)
        return chat.choices[0].message.content or ""

    return answer


@pytest.mark.slow
def test_a_node_is_lost_under_an_endpoint(three_nodes, model_folder, tmp_path):
    """Deployed from a Serve config file by the dashboard; every request is answered."""
    address, secret = deploy(three_nodes, tmp_path, model_folder, min_replicas=2, max_replicas=2, drain_seconds=10)
    answer = asker(address, secret)
    wanted, answers = answer(), []
    with three_nodes.losing_a_node("ServeReplica:owl:Engine") as lost:
        until = time.monotonic() + 60
        while time.monotonic() < until and not (lost and len(answers) > 40):
            answers.append(answer())
    assert len(answers) > 40
    assert set(answers) == {wanted}


@pytest.mark.slow
def test_a_bad_model_does_not_get_in_the_way(three_nodes, model_folder, tmp_path):
    """A folder without weights is deployed over a running endpoint: it is refused, and the old one answers on; so is
    another port, which Serve would disregard. The earlier file may be deployed again."""
    address, secret = deploy(three_nodes, tmp_path, model_folder, min_replicas=1, max_replicas=1, drain_seconds=5)
    answer = asker(address, secret)
    wanted = answer()
    shutil.copytree(model_folder, tmp_path / "bad", ignore=shutil.ignore_patterns("*.safetensors"))
    config = (tmp_path / "endpoint.yaml").read_text()
    (tmp_path / "bad.yaml").write_text(config.replace(model_folder, f"{tmp_path}/bad"))
    told = three_nodes.owl("serve", "--config", f"{tmp_path}/bad.yaml", address=three_nodes.address, check=False)
    assert told.returncode != 0
    assert "has no weights" in told.stderr
    assert answer() == wanted
    (tmp_path / "elsewhere.yaml").write_text(config.replace(str(three_nodes.port), "1"))
    told = three_nodes.owl("serve", "--config", f"{tmp_path}/elsewhere.yaml", address=three_nodes.address, check=False)
    assert told.returncode != 0
    assert f"Serve runs there with {three_nodes.port}" in " ".join(told.stderr.split())
    three_nodes.owl("serve", "--config", f"{tmp_path}/endpoint.yaml", address=three_nodes.address)
    assert answer() == wanted


@pytest.mark.slow
def test_a_stuck_worker_is_ended_and_training_goes_on(three_nodes, raw, tmp_path):
    """One of two is stopped, so the other waits for it in a collective; the run goes on from its last checkpoint."""
    text = ("--out", f"{raw.parent}/curated/text", "--recipe", "demo_small", "--set", "deduplication=null")
    three_nodes.owl("curate", f"{raw}/raw/text", *text)
    way = the_way(raw, tmp_path, put_together(raw.parent, load("demo_small")))
    three_nodes.owl(*way["pairs"])
    places = ("--set", "steps=60", "--set", "log_keys=true")
    with ThreadPoolExecutor(1) as jobs:
        job = jobs.submit(three_nodes.submit, "--name", f"{tmp_path.name}-stuck", *way["stage1"], *places)
        checkpoints = tmp_path / "stage1/checkpoints"
        until = time.monotonic() + 240
        while not any(checkpoints.glob("checkpoint_*")) and time.monotonic() < until:
            time.sleep(0.1)
        stuck, _ = next(three_nodes.workers("RayTrainWorker"))
        stuck.suspend()
        time.sleep(2)  # what was under way has ended
        before = sorted(checkpoints.iterdir())
        time.sleep(10)
        assert sorted(checkpoints.iterdir()) == before
        assert not job.done()
        stuck.kill()
        assert job.result()["step"] == 60


@pytest.mark.slow
def test_what_does_not_fit_the_object_stores_goes_by_disk(tmp_path):
    """Ray's least stores, a hundredth of what deduplication hands on: it finds all that it has to."""
    cluster = Cluster(tmp_path / "cluster")
    cluster.up("--store", "80")
    try:
        known = json.loads((cluster.folder / "cluster.json").read_text())
        rows = ("--rows", "4000000", "--dir", f"{tmp_path}/books")
        told = cluster.owl("bench", "duplicates", *rows, address=known["address"])
        found = json.loads(told.stdout.splitlines()[-1])
        assert found["dropped"] == {"duplicate_exact": found["made"], "duplicate_near": found["made"]}
        exported = [urlopen(f"http://127.0.0.1:{known[name]['metrics']}/metrics").read().decode() for name in known
                    if isinstance(known[name], dict)]  # fmt: skip
        spilled = re.findall(r'^ray_spill_manager_request_total\{.*Type="Spilled".*\} (\S+)', "".join(exported), re.M)
        assert sum(map(float, spilled)) > 0
    finally:
        cluster.down()
