"""Verbs as jobs on a cluster of three Ray nodes on this machine, of which one is lost during each: every job completes,
with the results of a run that nothing happened to. Real processes, real SIGKILLs."""

from __future__ import annotations

import filecmp
import json
import time
from pathlib import Path

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


@pytest.mark.slow
def test_a_node_is_lost_under_an_endpoint(three_nodes, model_folder, tmp_path):
    """Deployed from a Serve config file by the dashboard; every request is answered."""
    address, secret = deploy(three_nodes, tmp_path, model_folder, min_replicas=2, max_replicas=2, drain_seconds=10)
    client = OpenAI(base_url=f"{address}/v1", api_key=secret, max_retries=0, timeout=120)

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
