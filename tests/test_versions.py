"""Datasets that grow by versions, and the lock that lets one run at a time write them; on disk and on a real S3
server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pyarrow.ipc
import pytest
from s3_server import s3_bucket
from test_curation import DRAWN, noise, tar_of

from jobs.world.shards import World, write_world
from pipelines import storage
from pipelines.curation import ledger
from pipelines.curation.curate import curate
from pipelines.curation.inspect import diff
from pipelines.curation.rethreshold import rethreshold
from pipelines.curation.versions import acquire, history, publish, roll_back, writing
from pipelines.settings import OwlError
from pipelines.training.dataset import Dataset
from pipelines.training.train import with_version

ROOT = Path(__file__).parents[1]


def keys_of(dataset: str) -> list[str]:
    data = Dataset([dataset])
    return [data.read(shard, row, ["key"])["key"] for shard, rows in enumerate(data.rows) for row in range(rows)]


def add(raw: Path, name: str, seeds: range) -> None:
    """A raw shard of pictures that are told apart by their seeds; the same seed is the same picture."""
    raw.mkdir(exist_ok=True)
    tar_of(raw / f"{name}.tar", [(f"{name}-{seed}", noise(seed), f"a picture of number {seed}") for seed in seeds])


@pytest.fixture(scope="module")
def kept(cluster, tmp_path_factory) -> Path:
    """A set of raw shards that grew twice, and its dataset of three versions. Old raw shards were ruined in between."""
    folder = tmp_path_factory.mktemp("grown")
    raw, out = folder / "here/raw", f"{folder}/here/pairs"
    raw.mkdir(parents=True)
    for name, seeds in (("m", range(0, 10)), ("a", range(5, 15)), ("z", range(0, 20))):
        for old in raw.glob("*.tar"):
            old.write_bytes(b"nobody reads this again")
        add(raw, name, seeds)
        curate([str(raw)], out, DRAWN)
    shutil.copytree(folder / "here", folder / "kept")
    return folder


@pytest.fixture
def grown(kept) -> tuple[Path, str]:
    """The same for each test."""
    shutil.rmtree(kept / "here")
    shutil.copytree(kept / "kept", kept / "here")
    return kept / "here/raw", f"{kept}/here/pairs"


def test_a_dataset_grows_by_what_is_new(grown):
    raw, out = grown
    assert [(told["version"], told["kept"], told["shards"]) for told in history(out)] == [
        (1, 10, 1),
        (2, 15, 2),
        (3, 20, 3),
    ]
    assert [len(keys_of(f"{out}@{version}")) for version in (1, 2, 3)] == [10, 15, 20]
    assert sorted(keys_of(f"{out}@2")) == sorted([f"m-{n}" for n in range(10)] + [f"a-{n}" for n in range(10, 15)])
    assert keys_of(out) == keys_of(f"{out}@3")
    before = Path(out, "manifest.json").read_bytes()
    assert curate([str(raw)], out, DRAWN)["version"] == 3  # nothing is new
    assert Path(out, "manifest.json").read_bytes() == before
    changed = diff(f"{out}@1", f"{out}@3")
    assert (changed["same"], changed["moved"], len(changed["only_after"])) == (10, {}, 2)
    with pytest.raises(OwlError, match="has no version 9"):
        Dataset([f"{out}@9"])


def test_a_version_comes_back_and_what_was_withdrawn_stays_out(grown):
    raw, out = grown
    wanted = {version: keys_of(f"{out}@{version}") for version in (1, 2, 3)}
    assert roll_back(out, 1)["version"] == 4
    assert keys_of(out) == wanted[1]
    assert curate([str(raw)], out, DRAWN)["version"] == 4  # withdrawn shards are not taken again
    add(raw, "n", range(8, 12))
    assert curate([str(raw)], out, DRAWN)["version"] == 5
    assert sorted(keys_of(out)) == sorted(
        [*wanted[1], "n-10", "n-11"]
    )  # compared with what is in, not with what is out
    assert roll_back(out, 3)["version"] == 6
    assert keys_of(out) == wanted[3]
    assert {version: keys_of(f"{out}@{version}") for version in (1, 2, 3)} == wanted


def test_moved_thresholds_end_what_came_before(grown):
    _, out = grown
    rethreshold(out, DRAWN.limits.model_copy(update={"max_words": 40}))
    with pytest.raises(OwlError, match=r"version 2 .* is no longer there: rethreshold"):
        roll_back(out, 2)
    assert roll_back(out, 4)["kept"] == 20


def test_a_killed_run_leaves_the_version_before_it(grown):
    """Between a version's file and its copy, and before either."""
    raw, out = grown
    shutil.copy(f"{out}/versions/0002.json", f"{out}/manifest.json")  # as if killed between the two
    assert curate([str(raw)], out, DRAWN)["version"] == 3
    assert storage.read_json(f"{out}/manifest.json")["version"] == 3
    os.remove(f"{out}/versions/0003.json")
    shutil.copy(f"{out}/versions/0002.json", f"{out}/manifest.json")
    assert curate([str(raw)], out, DRAWN)["kept"] == 20  # from its markers: the raw shards are ruined
    assert len(history(out)) == 3


def test_training_keeps_the_version_that_it_began_with(grown):
    from pipelines.training.stages import Stage
    from pipelines.training.train import pinned

    raw, out = grown
    run = f"{raw.parent}/run"
    settings = pinned(Stage(data=[out], steps=1), run)
    assert settings.data == [f"{out}@3"] == [with_version(out)]
    storage.write_json(f"{run}/settings.json", {"stage": "stage1", **settings.model_dump(mode="json")})
    add(raw, "n", range(40, 44))
    curate([str(raw)], out, DRAWN)
    assert pinned(Stage(data=[out], steps=1), run).data == [f"{out}@3"]
    assert pinned(Stage(data=[out], steps=1), f"{run}2").data == [f"{out}@4"]


# --- the lock --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with s3_bucket(tmp_path_factory.mktemp("s3"), "grown") as running:
        yield running


@pytest.fixture(params=["disk", "s3"])
def place(request, tmp_path) -> str:
    if request.param == "disk":
        return f"{tmp_path}/out"
    request.getfixturevalue("server")
    return f"s3://grown/{tmp_path.name}"


def test_of_many_at_once_one_wins(place):
    """Each thread has a file system of its own, as other machines do."""
    won: list[int] = []
    go = threading.Barrier(8)

    def attempt(number: int) -> None:
        go.wait()
        if storage.create(f"{place}/once.json", json.dumps(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [storage.read_json(f"{place}/once.json")] == won


def test_a_lock_that_is_held_is_refused_and_one_given_back_is_free(place):
    told = f"another run is writing {place} \\(process {os.getpid()}"
    with writing(place, beat=0.05), pytest.raises(OwlError, match=told):
        acquire(place, dead=20.0)
    with writing(place):
        pass
    assert storage.listing(f"{place}/lock", ".json") == []


HOLD = """
import sys, time
from pipelines.curation.versions import writing
with writing(sys.argv[1], beat=0.1):
    print("held", flush=True)
    time.sleep(60)
"""


def killed_holder(place: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLD, place], stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    child.send_signal(signal.SIGKILL)
    child.wait()


def test_a_lock_of_a_killed_run_is_taken_over(place):
    killed_holder(place)
    began = time.monotonic()
    with writing(place, dead=30.0):
        assert time.monotonic() - began < 15  # it died on this machine: nothing to wait for
    killed_holder(place)
    path = storage.listing(f"{place}/lock", ".json")[-1]
    storage.write_json(path, {**storage.read_json(path), "kernel": "another machine's"})
    began = time.monotonic()
    with writing(place, dead=1.5) as lock:
        assert time.monotonic() - began >= 1.5
        assert len(storage.listing(f"{place}/lock", ".json")) == 1
        lock.refuse_if_lost()


def test_a_run_that_slept_too_long_makes_no_version(place):
    """It wakes up, finds that another took over, and leaves everything as it is."""
    asleep = acquire(place, dead=0.1)
    storage.write_json(asleep.path, {**storage.read_json(asleep.path), "kernel": "another machine's"})
    with writing(place, dead=0.3) as awake:
        publish(place, {"shards": [], "in": 1, "kept": 1}, "curate", awake)
        keeper = threading.Thread(target=asleep.keep, args=(0.01,))
        keeper.start()
        keeper.join(timeout=20)
        assert asleep.lost
        with pytest.raises(OwlError, match="took over"):
            publish(place, {"shards": [], "in": 2, "kept": 2}, "curate", asleep)
    assert storage.read_json(f"{place}/manifest.json")["in"] == 1


# --- scheduled, on S3, by the command --------------------------------------------------------------------------------


@pytest.mark.slow
def test_scheduled_curation_on_s3(server, tmp_path):
    """Three nights over a set that grows; then two runs at once; then a rollback."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    raw, out = "s3://grown/raw", "s3://grown/pairs"
    fs = fsspec.filesystem("s3")

    def owl(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "jobs.cli", "curate", *arguments, "--json"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def night() -> subprocess.Popen:
        return owl(f"{raw}/*.tar", "--out", out, "--recipe", "demo_small")

    def told(run: subprocess.Popen) -> dict:
        output, error = run.communicate(timeout=240)
        assert run.returncode == 0, error
        return json.loads(output.splitlines()[-1])

    write_world(tmp_path / "world", World(pairs=240, shards=4, seed=3), "pairs")
    tars = sorted((tmp_path / "world/raw/pairs").glob("*.tar"))
    kept = []
    for number, tar in enumerate(tars[:3], 1):
        fs.put(str(tar), f"{raw}/{tar.name}")
        result = told(night())
        assert result["version"] == number
        kept.append(result["kept"])
        fs.pipe(f"{raw}/{tar.name}", b"nobody reads this again")
    manifest = storage.read_json(f"{out}/manifest.json")
    repeated = {
        reason for entry in manifest["shards"][1:] for reason in entry["dropped"] if reason.startswith("duplicate")
    }
    assert repeated  # of pictures that earlier nights had
    keys = keys_of(out)

    fs.put(str(tars[3]), f"{raw}/{tars[3].name}")
    both = [night(), night()]
    ends = [(run.communicate(timeout=240), run.returncode) for run in both]
    assert sorted(code for _, code in ends) == [0, 1]
    (_, error), _ = next(end for end in ends if end[1] == 1)
    assert "another run" in error
    assert [entry["version"] for entry in history(out)] == [1, 2, 3, 4]
    for entry in storage.read_json(f"{out}/manifest.json")["shards"]:
        path = f"{out}/shards/{entry['shard']}.arrow"
        assert storage.sha256(path) == entry["sha256"]
        with storage.open_read(path) as file:
            assert pyarrow.ipc.open_file(file).read_all().num_rows == entry["rows"]
        assert ledger.read_ledger(out, entry["shard"]).num_rows == entry["in"]

    assert told(owl("rollback", out, "--to", "3"))["kept"] == kept[2]
    assert keys_of(out) == keys
    assert told(night())["version"] == 5  # what was withdrawn stays out
