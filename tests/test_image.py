"""The Dockerfile's steps, run in a plain Debian root: no Docker engine is needed, only debootstrap and root."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.world.shards import World, write_world

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "cluster/Dockerfile"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("debootstrap"), reason="debootstrap is not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="a root of its own needs root's rights"),
]


def stages(text: str) -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Name → what it begins from, and its instructions in order."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    current: list[tuple[str, str]] = []
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            parent, _, name = rest.split()
            found[name] = parent, (current := [])
        elif found:  # an ARG before the first FROM is for FROM lines
            current.append((word, rest))
    return found


class Image:
    """What `docker build` does with the instructions that the Dockerfile uses. Any other is refused."""

    def __init__(self, root: Path, arguments: dict[str, str], carried: dict[str, str]):
        self.root, self.arguments, self.carried = root, arguments, carried
        self.environment: dict[str, str] = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.given: dict[str, str] = {}
        self.who, self.folder = "root", "/"

    def build(self, all_stages: dict, name: str) -> None:
        parent, instructions = all_stages[name]
        if parent in all_stages:
            self.build(all_stages, parent)
        self.given = {}  # arguments end with their stage
        for word, rest in instructions:
            getattr(self, word.lower())(rest)

    def arg(self, rest: str) -> None:
        name, default = rest.split("=", 1)
        self.given[name] = self.arguments.get(name, default)

    def env(self, rest: str) -> None:
        self.environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))

    def workdir(self, rest: str) -> None:
        self.folder = rest
        (self.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def copy(self, rest: str) -> None:
        *sources, target = shlex.split(rest)
        place = self.root / self.folder.lstrip("/") / target
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, place / source if target.endswith("/") else place)

    def user(self, rest: str) -> None:
        self.who = rest

    def cmd(self, rest: str) -> None:
        self.command = json.loads(rest)

    def run(self, command: str) -> str:
        environment = self.environment | self.given | self.carried
        inside = f"cd {self.folder} && {command}"
        done = subprocess.run(
            [shutil.which("chroot") or "chroot", f"--userspec={self.who}", self.root, "/bin/sh", "-c", inside],
            env=environment | {"HOME": "/root" if self.who == "root" else f"/home/{self.who}"},
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout


@contextlib.contextmanager
def mounted(root: Path, places: list[str]) -> Iterator[None]:
    """What a container has, and this machine's own packages where its pip is told of some."""
    with contextlib.ExitStack() as stack:
        for place in places:
            inside = root / place.lstrip("/")
            inside.mkdir(parents=True, exist_ok=True)
            if subprocess.run(["mount", "--rbind", place, inside], capture_output=True).returncode:
                pytest.skip(f"{place} cannot be mounted in a root of its own here")
            stack.callback(subprocess.run, ["umount", "--recursive", "--lazy", str(inside)], check=True)
        yield


def test_the_image_is_built_and_curates_as_a_user_without_rights(tmp_path):
    root = tmp_path / "root"
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", root], check=True, capture_output=True, timeout=900)
    told = subprocess.run(["pip", "config", "list"], capture_output=True, text=True).stdout
    mine = dict(re.findall(r"global\.(cert|find-links)='(/[^']+)'", told))  # of a machine behind a proxy, such as CI's
    wheels = mine.get("find-links")
    with mounted(root, ["/proc", "/dev", *([wheels] if wheels else [])]):
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
        carried = {"PIP_FIND_LINKS": wheels} if wheels else {}
        if "cert" in mine:
            shutil.copy(mine["cert"], root / "etc/proxy.crt")
            carried["PIP_CERT"] = "/etc/proxy.crt"
        image = Image(root, {"TORCH_INDEX": "https://pypi.org/simple"}, carried)
        image.build(stages(DOCKERFILE.read_text()), "cpu")
        assert image.run("whoami").strip() == "owl"
        assert "curate" in image.run(shlex.join(image.command))

        pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
        there = dict(re.findall(r"^([\w.-]+)==([^\s+]+)", image.run("pip freeze"), re.M))
        assert {name: version for name, version in there.items() if pinned.get(name, "").split("+")[0] != version} == {}

        write_world(root / "home/owl/world", World(pairs=60, instructions=1, texts=1, questions=1, shards=2), "pairs")
        curated = image.run("owl curate world/raw/pairs --out pairs --recipe demo_small --json")
        assert json.loads(curated.splitlines()[-1])["in"] > 60
