"""The demo as a process: killed in every phase, stopped by Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

PHASES = 7
FINISHED = (  # by phase: what a later run must leave as it is
    "world/raw/*/*.tar",
    "curated/*/shards/*.arrow",
    "runs/language/model/model.safetensors",
    "runs/stage1/model/model.safetensors",
    "runs/stage2/model/model.safetensors",
    "evaluation/answers/*",
)


def begin(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "jobs.cli", "demo", "--recipe", "demo_small", "--dir", str(folder)]
    # A test run in the background inherits an ignored SIGINT; the demo must not.
    answer_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=answer_ctrl_c)


def reach(demo: subprocess.Popen, phase: int) -> None:
    assert demo.stderr
    for line in demo.stderr:
        if line.startswith(f"{phase}/{PHASES}"):
            return
    pytest.fail(f"the demo ended with {demo.wait()} before phase {phase}")


def stop(demo: subprocess.Popen, number: int) -> list[psutil.Process]:
    """Sends a signal to the driver alone; returns the processes that it had started."""
    family = psutil.Process(demo.pid).children(recursive=True)
    os.kill(demo.pid, number)
    demo.wait(timeout=60)
    return family


def none_alive(family: list[psutil.Process], seconds: float) -> bool:
    return not psutil.wait_procs(family, timeout=seconds)[1]


def written(folder: Path, phases: int) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for pattern in FINISHED[:phases] for path in folder.glob(pattern)}


@pytest.mark.slow
def test_killed_in_every_phase_it_goes_on_and_repeats_nothing(tmp_path):
    started: list[psutil.Process] = []
    for phase in range(1, PHASES + 1):
        before = written(tmp_path, phase - 2)  # what was whole when the last run was killed
        demo = begin(tmp_path)
        reach(demo, phase)
        time.sleep(0.7 * phase)  # into the phase; later ones take longer to begin
        started += stop(demo, signal.SIGKILL)
        assert before.items() <= written(tmp_path, PHASES).items()
    before = written(tmp_path, PHASES)
    demo = begin(tmp_path)
    said = demo.communicate(timeout=300)[1]
    assert demo.returncode == 0, said
    assert before == written(tmp_path, PHASES)
    assert (tmp_path / "report.html").exists()
    assert not list(tmp_path.rglob("*.partial"))
    assert none_alive(started, seconds=180)  # Ray's agents look for their parent once in a while


@pytest.mark.slow
@pytest.mark.parametrize("phase", [2, 4, 7])
def test_ctrl_c_leaves_no_process_behind(tmp_path, phase):
    demo = begin(tmp_path)
    reach(demo, phase)
    time.sleep(3)
    assert none_alive(stop(demo, signal.SIGINT), seconds=30)
    assert demo.returncode == 130
