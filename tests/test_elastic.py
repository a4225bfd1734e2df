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
from pipelines.training.order import positions

pytestmark = pytest.mark.slow


def wait_until(found, what: str, driver: subprocess.Popen, seconds: float = 240) -> None:
    deadline = time.time() + seconds
    while not found():
        assert driver.poll() is None, f"ended with {driver.returncode} before {what}"
        assert time.time() < deadline, what
        time.sleep(0.2)


def parts(run: str, workers: int) -> list[str]:
    return [path for path in storage.listing(f"{run}/keys", ".json") if path.endswith(f"of{workers}.json")]


def test_a_lost_machine_is_done_without_and_taken_back(cluster, world, model_folder, tmp_path):
    from pipelines.curation.curate import Curation, curate

    curate([f"{world}/raw/instructions"], f"{tmp_path}/data", Curation(deduplication=None))
    environment = {
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    }
    os.environ.update(environment)
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = machines.add_node(num_cpus=1, resources={"second": 1})
    run = f"{tmp_path}/run"
    command = [sys.executable, "-m", "jobs.cli", "train", "stage1", "--recipe", "demo", "--start", model_folder]
    command += ["--data", f"{tmp_path}/data", "--run", run]
    settings = {"steps": 4000, "batch_size": 4, "workers": 2, "min_workers": 1, "checkpoint_every": 20}
    settings |= {"log_every": 1, "log_keys": "true", "max_failures": 5, "optimization.optimizer": "adamw"}
    command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    with open(tmp_path / "log", "w") as log:
        driver = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": machines.address}, stderr=log)
    try:
        wait_until(lambda: parts(run, 2), "two workers", driver)
        machines.remove_node(second, allow_graceful=False)
        wait_until(lambda: parts(run, 1), "one worker", driver)
        before = len(parts(run, 2))
        machines.add_node(num_cpus=1)
        wait_until(lambda: len(parts(run, 2)) > before, "two workers again", driver)
    finally:
        driver.kill()
        machines.shutdown()
    batches: dict[int, set[str]] = {}
    for path in storage.listing(f"{run}/keys", ".json"):
        for step, keys in storage.read_json(path).items():
            batches.setdefault(int(step), set()).update(keys)
    steps = sorted(batches)
    assert steps == list(range(1, steps[-1] + 1))
    assert all(len(keys) <= len(positions(0, 4)) for keys in batches.values())
