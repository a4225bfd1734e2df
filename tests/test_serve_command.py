"""`owl serve` as a user types it: an address, a key, a curl line that works, and an end that leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest
import requests

MODES = [pytest.param(["--alone"], id="alone"), pytest.param([], id="serve", marks=pytest.mark.slow)]


@pytest.mark.parametrize("mode", MODES)
def test_serve_answers_and_ends(model_folder, mode, tmp_path):
    command = [sys.executable, "-m", "jobs.cli", "serve", model_folder, "--port", "0", *mode]
    began = time.monotonic()
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, preexec_fn=restore)
    try:
        line = server.stdout.readline()  # the curl line, on standard output alone
        print(f"{time.monotonic() - began:.1f} s from the command to the address")
        assert line.startswith("curl http://127.0.0.1:")
        answer = json.loads(subprocess.run([*shlex.split(line), "-sS"], capture_output=True, check=True).stdout)
        assert answer["choices"][0]["finish_reason"] in ("stop", "length")
        deadline = time.monotonic() + 20
        while not (page := re.search(r"(http\S+)/#key=(\S+)", (tmp_path / "log").read_text().replace("\n", ""))):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert requests.get(f"{page[1]}/").status_code == 200
        listed = requests.get(f"{page[1]}/v1/models", headers={"authorization": f"Bearer {page[2]}"})
        assert listed.json()["data"][0]["id"] == "owl"
        family = psutil.Process(server.pid).children(recursive=True)
        replicas = [process for process in family if process.cmdline()[0].startswith("ray::ServeReplica")]
        assert bool(replicas) == (not mode)
        ports = [each for process in replicas for each in process.net_connections("tcp") if each.status == "LISTEN"]
        assert [each for each in ports if each.laddr.ip == "127.0.0.1"] == []  # clients' only way in is the proxy
        server.send_signal(signal.SIGINT)
        server.wait(60)
        _, alive = psutil.wait_procs(family, timeout=20)
        assert alive == []
    finally:
        server.kill()
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said
    assert "hello" not in said  # nothing that was asked is in the log


def restore() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setpgrp()
