"""A run on two machines that loses one goes on with the other, and grows again when there is a second."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from pipelines import storage

pytestmark = pytest.mark.slow


class Run:
    """A run of two workers on a cluster of two machines, one CPU each."""

    def __init__(self, folder: Path, world: Path, model: str, checkpoint_every: int):
        from pipelines.curation.curate import curate
        from pipelines.curation.options import Curation

        curate([f"{world}/raw/instructions"], f"{folder}/data", Curation(deduplication=None))
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
        self.machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        self.second = self.machines.add_node(num_cpus=1)
        self.folder = f"{folder}/run"
        settings = {"steps": 40_000, "batch_size": 4, "workers": 2, "min_workers": 1, "max_failures": 5}
        settings |= {"checkpoint_every": checkpoint_every, "log_keys": "true", "optimization.optimizer": "adamw"}
        command = [sys.executable, "-m", "jobs.cli", "train", "stage1", "--recipe", "demo", "--start", model]
        command += ["--data", f"{folder}/data", "--run", self.folder]
        command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": self.machines.address}
        with open(folder / "log", "w") as log:
            self.driver = subprocess.Popen(command, env=environment, stderr=log)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error) -> None:
        self.driver.kill()
        self.machines.shutdown()

    def wait_until(self, found, what: str, seconds: float = 240) -> None:
        deadline = time.time() + seconds
        while not found():
            assert self.driver.poll() is None, f"ended with {self.driver.returncode} before {what}"
            assert time.time() < deadline, what
            time.sleep(0.2)

    def parts(self, workers: int) -> list[str]:
        """The files of keys that so many workers wrote."""
        return [path for path in storage.listing(f"{self.folder}/keys", ".json") if path.endswith(f"of{workers}.json")]

    def checkpoints(self) -> list[int]:
        names = map(storage.name_of, storage.listing(f"{self.folder}/checkpoints", ""))
        return [int(name.removeprefix("step_")) for name in names if name.startswith("step_")]


def test_a_lost_machine_is_done_without_and_taken_back(cluster, world, model_folder, tmp_path):
    with Run(tmp_path, world, model_folder, checkpoint_every=20) as run:
        run.wait_until(lambda: run.parts(2), "two workers")
        run.machines.remove_node(run.second, allow_graceful=False)
        run.wait_until(lambda: run.parts(1), "one worker")
        before = len(run.parts(2))
        run.machines.add_node(num_cpus=1)
        run.wait_until(lambda: len(run.parts(2)) > before, "two workers again")
    batches: dict[int, set[str]] = {}
    for path in storage.listing(f"{run.folder}/keys", ".json"):
        for step, keys in storage.read_json(path).items():
            batches.setdefault(int(step), set()).update(keys)
    assert sorted(batches) == list(range(1, max(batches) + 1))
    assert all(len(keys) <= 4 for keys in batches.values())  # the same samples, by whoever they were computed


def test_a_reclaim_that_is_announced_loses_no_step(cluster, world, model_folder, tmp_path):
    """The node is drained as an autoscaler would drain a spot machine; checkpoints would otherwise be far apart."""
    every = 20_000
    with Run(tmp_path, world, model_folder, checkpoint_every=every) as run:
        time.sleep(1)
        run.wait_until(lambda: storage.listing(f"{run.folder}/tensorboard", ""), "the first step")
        time.sleep(5)
        drain = [f"{sys.prefix}/bin/ray", "drain-node", "--address", run.machines.address]
        drain += ["--node-id", run.second.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        drain += ["--reason-message", "spot", "--deadline-remaining-seconds", "60"]
        subprocess.run(drain, check=True, capture_output=True, env=os.environ | {"RAY_AUTH_MODE": "disabled"})
        run.wait_until(run.checkpoints, "a checkpoint")
        (step,) = run.checkpoints()
        assert step % every
        assert max(int(storage.name_of(path).split("-")[1]) for path in run.parts(2)) == step
