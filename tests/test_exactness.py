"""Training that is killed, resumed and cut anew equals training that is left alone: keys, losses and weights."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import fsspec
import psutil
import pytest
import torch
from s3_server import s3_server

from owl_model import OwlForConditionalGeneration
from pipelines import storage

pytestmark = pytest.mark.slow
STEPS, BATCH = 60, 8
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(Path(__file__).parents[1])}


def start(stage: str, run: str, data: dict[str, str], model: str, workers: int, environment: dict, log: Path):
    """A mixture of texts and pictures, packed, in micro-batches, on so many workers."""
    settings = {
        "steps": STEPS,
        "batch_size": BATCH,
        "micro_batch": 2,
        "weights": "[2, 1]",
        "pack_tokens": 96,
        "max_tokens": 96,
        "checkpoint_every": 5,
        "log_every": 1,
        "log_keys": "true",
        "workers": workers,
        "lora.dropout": 0,
        "optimization.optimizer": "adamw",
        "optimization.learning_rate": 1e-4,
        "max_failures": 4,
    }
    command = [sys.executable, "-m", "jobs.cli", "train", stage, "--recipe", "demo", "--start", model, "--run", run]
    command += [part for name in ("text", "instructions") for part in ("--data", data[name])]
    command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    with open(f"{log}-{time.time():.0f}.txt", "w") as errors:
        return subprocess.Popen(command, env=os.environ | environment, stderr=errors)


def curated(world, folder: Path) -> dict[str, str]:
    from pipelines.curation.curate import curate
    from pipelines.curation.options import Curation

    data = {part: f"{folder}/{part}" for part in ("instructions", "text")}
    for part, target in data.items():
        curate([f"{world}/raw/{part}"], target, Curation(deduplication=None))
    return data


def keys_of(run: str) -> dict[int, list[str]]:
    """Step → the keys of its global batch, sorted; a step that was done again must have had the same."""
    parts: dict[tuple[str, int], list[dict]] = defaultdict(list)  # (steps, workers) → what each wrote
    for path in storage.listing(f"{run}/keys", ".json"):
        steps, _, who = storage.name_of(path).removesuffix(".json").rpartition("-")
        parts[steps, int(who.partition("of")[2])].append(storage.read_json(path))
    found: dict[int, list[str]] = {}
    for (_, workers), written in parts.items():
        if len(written) < workers:
            continue  # one was killed before it wrote its part
        for step in written[0]:
            batch = sorted(key for part in written for key in part[step])
            assert found.setdefault(int(step), batch) == batch, f"step {step} had other samples later"
    return found


def wait_for_step(run: str, step: int, driver: subprocess.Popen) -> None:
    deadline = time.time() + 400
    while time.time() < deadline:
        assert driver.poll() is None, f"ended with {driver.returncode} before step {step}"
        done = [int(storage.name_of(path).split("-")[1]) for path in storage.listing(f"{run}/keys", ".json")]
        if max(done, default=0) >= step:
            return
        time.sleep(0.1)
    raise TimeoutError(f"step {step} did not come")


def workers_of(driver: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for each in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in "".join(each.cmdline()[:1]):
                found.append(each)
    return found


def kill_worker(driver: subprocess.Popen) -> None:
    workers = workers_of(driver)
    assert len(workers) == 2
    workers[1].kill()


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_killed_and_resumed_elsewhere_equals_left_alone(stage, cluster, world, model_folder, tmp_path, monkeypatch):
    """60 steps straight, on two workers, from disk; and with a worker killed after 20, the driver after 40, the rest on
    one worker, with data, run and checkpoints on an S3 server."""
    data, environment = curated(world, tmp_path), dict(ENVIRONMENT)
    calm = f"{tmp_path}/calm"
    assert start(stage, calm, data, model_folder, 2, environment, tmp_path / "log").wait() == 0
    with s3_server(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        environment |= server.environment
        bucket = fsspec.filesystem("s3")
        bucket.mkdir("owl")
        remote = {part: f"s3://owl/{part}" for part in data}
        for part, folder in data.items():
            storage.write_folder(folder, remote[part])
        run = "s3://owl/run"
        driver = start(stage, run, remote, model_folder, 2, environment, tmp_path / "log")
        wait_for_step(run, 20, driver)
        kill_worker(driver)
        wait_for_step(run, 40, driver)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        time.sleep(2)  # its workers end by themselves
        assert start(stage, run, remote, model_folder, 1, environment, tmp_path / "log").wait() == 0
        undisturbed, disturbed = storage.read_json(f"{calm}/log.json"), storage.read_json(f"{run}/log.json")
        calm_keys, keys = keys_of(calm), keys_of(run)
        with storage.local_folder(f"{run}/model") as here:
            weights = OwlForConditionalGeneration.from_pretrained(here).state_dict()
        kept = [path for path in storage.listing(f"{run}/checkpoints", "") if "step_" in path]
    assert keys == calm_keys
    assert sorted(keys) == list(range(1, STEPS + 1))
    assert all(len(batch) == BATCH for batch in keys.values())
    losses, expected = ([entry["loss"] for entry in log["history"]] for log in (disturbed, undisturbed))
    assert losses == pytest.approx(expected, rel=1e-6)
    assert list(disturbed["used"].values()) == list(undisturbed["used"].values())
    for name, value in OwlForConditionalGeneration.from_pretrained(f"{calm}/model").state_dict().items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0, msg=name)
    assert len(kept) <= 6  # two that stay, and those that a killed driver had not heard of


def test_a_worker_that_dies_while_its_group_starts_is_replaced(cluster, world, model_folder, tmp_path):
    """At its first breath, and a little later, and later still."""
    data = curated(world, tmp_path)
    driver = start("stage1", f"{tmp_path}/run", data, model_folder, 1, ENVIRONMENT, tmp_path / "log")
    seen: set[int] = set()
    for later in (0.0, 0.7, 2.0):
        while not (fresh := [each for each in workers_of(driver) if each.pid not in seen]):
            assert driver.poll() is None
            time.sleep(0.02)
        time.sleep(later)
        seen |= {each.pid for each in fresh}
        for each in fresh:
            each.kill()
    assert driver.wait() == 0
    assert sorted(keys_of(f"{tmp_path}/run")) == list(range(1, STEPS + 1))
