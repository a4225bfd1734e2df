"""`owl cluster`: some Ray nodes on this machine, each a process group of its own, so that one can be lost like a real
node. DIR/cluster.json has their processes; nothing but these is ever ended."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.table import Table

from jobs.options import AsJson, console, finish
from jobs.session import prepare_environment
from pipelines import storage
from pipelines.settings import OwlError

app = typer.Typer(no_args_is_help=True, help="A cluster of several Ray nodes on this machine.")
Folder = Annotated[Path, typer.Option("--dir", help="The cluster's folder: its processes and logs.")]
HERE = Path("owl-cluster")
FILES = Path(__file__).parents[1] / "cluster"
COMES_UP_WITHIN = 120


@app.command()
def up(
    nodes: Annotated[int, typer.Option("--nodes", help="Nodes besides the head.", min=0)] = 2,
    cpus: Annotated[int, typer.Option("--cpus", help="CPUs that each of them offers.", min=1)] = 2,
    head_cpus: Annotated[int, typer.Option("--head-cpus", help="CPUs that the head offers to work.", min=0)] = 0,
    port: Annotated[int, typer.Option("--port", help="The head's port; 0 takes a free one.")] = 6379,
    dashboard: Annotated[int, typer.Option("--dashboard", help="The dashboard's port; 0 takes a free one.")] = 8265,
    store: Annotated[int, typer.Option("--store", help="MB of each node's object store.")] = 200,
    dir: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Starts the nodes that are missing, and waits until all are there."""
    prepare_environment()
    known = read(dir)
    if not alive(known.get("head")):
        known = start_head(dir, head_cpus, port, dashboard, store)
    for name in (f"node{number}" for number in range(1, nodes + 1)):
        if not alive(known.get(name)):
            known[name] = start(dir, name, known, "--address", known["address"], "--num-cpus", str(cpus), store=store)
            storage.write_json(f"{dir}/cluster.json", known)
            wait_for(known)  # two that start at once would take each other's sockets
    write_targets(dir, known)
    told = {name: known[name] for name in ("address", "dashboard")} | {"nodes": nodes + 1}

    def show() -> None:
        console.print(f"{nodes + 1} nodes. The dashboard: {known['dashboard']} (its token: owl cluster token)")
        print(f"export RAY_ADDRESS={known['dashboard']} RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']}")
        console.print("With that line in a shell, `owl submit VERB …` runs a verb on the cluster.")

    finish(told, as_json, show)


@app.command()
def down(
    node: Annotated[str, typer.Option("--node", help="Only this one, at once, as a machine is lost: node1.")] = "",
    dir: Folder = HERE,
) -> None:
    """Ends the cluster, or one node of it."""
    known = read(dir)
    if node and not alive(known.get(node)):
        raise OwlError(f"no node {node!r} runs; there are {', '.join(running(known)) or 'none'}")
    for name in [node] if node else reversed(running(known)):
        end(known[name], at_once=bool(node))
        console.print(f"{name} ended")
    if not node:
        storage.remove(f"{dir}/cluster.json")


@app.command()
def status(dir: Folder = HERE, as_json: AsJson = False) -> None:
    """The cluster's nodes, and whether they run."""
    known = read(dir)
    if not known:
        raise OwlError(f"no cluster was started in {dir}: owl cluster up")
    nodes = {name: entry for name, entry in known.items() if isinstance(entry, dict)}
    told = {name: {"pid": entry["pid"], "runs": alive(entry)} for name, entry in nodes.items()}

    def show() -> None:
        table = Table("node", "process", "", box=None)
        for name, entry in told.items():
            table.add_row(name, str(entry["pid"]), "runs" if entry["runs"] else "is gone")
        console.print(table)
        console.print(f"The dashboard: {known['dashboard']}")

    finish({"address": known["address"], "dashboard": known["dashboard"], "nodes": told}, as_json, show)


@app.command()
def watch(
    port: Annotated[int, typer.Option("--port", help="Prometheus' port; 0 takes a free one.")] = 9090,
    files: Annotated[Path, typer.Option("--files", help="The folder cluster/ of a checkout.")] = FILES,
    dir: Folder = HERE,
) -> None:
    """Starts Prometheus (Debian: apt install prometheus) with the alerts and dashboards of cluster/, and Grafana too
    where it is installed. They end with the cluster."""
    known = read(dir)
    if not alive(known.get("head")):
        raise OwlError(f"no cluster runs in {dir}: owl cluster up")
    if not (files / "prometheus/prometheus.yaml").exists():
        raise OwlError(
            f"{files} has no prometheus/prometheus.yaml: name the folder cluster/ of a checkout with --files"
        )
    if not shutil.which("prometheus"):
        raise OwlError("there is no prometheus here: apt install prometheus, or https://prometheus.io/download")
    if not alive(known.get("prometheus")):
        known["prometheus"] = start_prometheus(dir, files, port or free_ports(1)[0])
        storage.write_json(f"{dir}/cluster.json", known)
    address = known["prometheus"]["address"]
    console.print(f"Dashboards: {address}/user/board.html   Alerts: {address}/alerts", soft_wrap=True)
    if shutil.which("grafana"):
        if not alive(known.get("grafana")):
            known["grafana"] = start_grafana(dir, files, address)
            storage.write_json(f"{dir}/cluster.json", known)
        console.print(f"Grafana: {known['grafana']['address']}/dashboards", soft_wrap=True)


def start_prometheus(folder: Path, files: Path, port: int) -> dict[str, Any]:
    """With this machine's nodes as its targets: Ray's list of them is made for the newest Ray on the machine."""
    import yaml

    config = yaml.safe_load((files / "prometheus/prometheus.yaml").read_text())
    config["rule_files"] = [str((files / "prometheus/alerts.yaml").absolute())]
    config["scrape_configs"][0]["file_sd_configs"][0]["files"] = [str((folder / "targets.json").absolute())]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    write_targets(folder, read(folder))
    options = {"config.file": f"{folder}/prometheus.yaml", "storage.tsdb.path": f"{folder}/prometheus"}
    options |= {"web.listen-address": f"127.0.0.1:{port}", "web.user-assets": str((files / "grafana").absolute())}
    command = ["prometheus", *(f"--{name}={value}" for name, value in options.items())]
    return {**spawn(folder, "prometheus", command), "address": f"http://127.0.0.1:{port}"}


def start_grafana(folder: Path, files: Path, prometheus: str) -> dict[str, Any]:
    """On this machine only, for whoever is on it."""
    (port,) = free_ports(1)
    provisioning = folder / "grafana/provisioning"
    for name, old, new in (
        ("datasource", "http://127.0.0.1:9090", prometheus),
        ("dashboards", "/var/lib/grafana/dashboards/owl", str((files / "grafana").absolute())),
    ):
        place = provisioning / ("datasources" if name == "datasource" else name)
        place.mkdir(parents=True, exist_ok=True)
        text = (files / f"grafana/provisioning/{name}.yaml").read_text()
        (place / f"{name}.yaml").write_text(text.replace(old, new))
    settings = {
        "GF_SERVER_HTTP_ADDR": "127.0.0.1",
        "GF_SERVER_HTTP_PORT": str(port),
        "GF_PATHS_DATA": f"{folder.absolute()}/grafana",
        "GF_PATHS_PROVISIONING": str(provisioning.absolute()),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
    }
    home = os.environ.get("GF_PATHS_HOME", "/usr/share/grafana")
    entry = spawn(folder, "grafana", ["grafana", "server", "--homepath", home], settings)
    return {**entry, "address": f"http://127.0.0.1:{port}"}


def write_targets(folder: Path, known: dict[str, Any]) -> None:
    nodes = {name: entry["metrics"] for name, entry in known.items() if isinstance(entry, dict) and "metrics" in entry}
    targets = [{"targets": [f"127.0.0.1:{port}"], "labels": {"node": name}} for name, port in nodes.items()]
    storage.write_json(f"{folder}/targets.json", targets)


@app.command()
def token() -> None:
    """What the dashboard asks for: the content of ~/.ray/auth_token, which lets its owner do anything on the
    cluster."""
    prepare_environment()
    print(auth_token())


def auth_token() -> str:
    """Made where there is none yet."""
    here = beside_this_python()
    command = [shutil.which("ray", path=here["PATH"]) or "ray", "get-auth-token", "--generate"]
    return subprocess.run(command, env=here, check=True, capture_output=True, text=True).stdout.strip()


def read(folder: Path) -> dict[str, Any]:
    path = folder / "cluster.json"
    return storage.read_json(str(path)) if path.exists() else {}


def running(known: dict[str, Any]) -> list[str]:
    return [name for name, entry in known.items() if isinstance(entry, dict) and alive(entry)]


def start_head(folder: Path, cpus: int, port: int, dashboard: int, store: int) -> dict[str, Any]:
    free = free_ports(2)
    port, dashboard = port or free[0], dashboard or free[1]
    for each in (port, dashboard):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", each)) == 0:
                raise OwlError(f"port {each} is taken; choose others with --port and --dashboard (0 takes a free one)")
    folder.mkdir(parents=True, exist_ok=True)
    if os.environ["RAY_AUTH_MODE"] == "token":
        auth_token()  # a head makes none by itself
    known: dict[str, Any] = {"address": f"127.0.0.1:{port}", "dashboard": f"http://127.0.0.1:{dashboard}"}
    head = ("--head", "--port", str(port), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard))
    known["head"] = start(folder, "head", known, *head, "--num-cpus", str(cpus), store=store)
    storage.write_json(f"{folder}/cluster.json", known)
    wait_for(known)
    return known


def start(folder: Path, name: str, known: dict[str, Any], *options: str, store: int) -> dict[str, Any]:
    """A node: a session of processes that ends as one."""
    listen, grpc, runtime, metrics = (str(port) for port in free_ports(4))
    command = ["ray", "start", *options, "--object-store-memory", str(store << 20), "--block"]
    command += ["--dashboard-agent-listen-port", listen, "--dashboard-agent-grpc-port", grpc]
    command += ["--runtime-env-agent-port", runtime, "--metrics-export-port", metrics]
    environment = {"RAY_raylet_start_wait_time_s": str(COMES_UP_WITHIN)}  # several share this machine
    if watched := known.get("prometheus"):
        environment["RAY_PROMETHEUS_HOST"] = watched["address"]
    return {**spawn(folder, name, command, environment), "metrics": int(metrics)}


def spawn(folder: Path, name: str, command: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    here = beside_this_python() | (environment or {})
    here.pop("RAY_ADDRESS", None)  # another cluster's, it may be
    program = shutil.which(command[0], path=here["PATH"]) or command[0]
    with open(folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen([program, *command[1:]], env=here, stdout=log, stderr=log, start_new_session=True)
    return {"pid": process.pid, "began": psutil.Process(process.pid).create_time()}


def beside_this_python() -> dict[str, str]:
    """The environment, in which this Python's programs come first: a job's `python` is its node's."""
    return os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}


def alive(entry: dict[str, Any] | None) -> bool:
    """Whether the process of that number is still the one that was started."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(entry["pid"]) if entry else None
        same = process and entry and process.create_time() == entry["began"]
        return bool(process and same and process.status() != psutil.STATUS_ZOMBIE)
    return False


def end(entry: dict[str, Any], at_once: bool) -> None:
    """Every process of a node's session; ``at_once`` gives it no time for a farewell."""
    session = [process for process in psutil.process_iter() if session_of(process) == entry["pid"]]
    for process in session:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)
    _, left = psutil.wait_procs(session, timeout=15)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)


def session_of(process: psutil.Process) -> int | None:
    with suppress(ProcessLookupError, PermissionError):
        return os.getsid(process.pid)
    return None


def wait_for(known: dict[str, Any]) -> None:
    """Until all nodes are in the cluster's list. Raises OwlError where one has ended, or none comes."""
    from ray.util.state import list_nodes

    nodes = {name: entry for name, entry in known.items() if isinstance(entry, dict) and "metrics" in entry}
    until = time.monotonic() + COMES_UP_WITHIN
    while time.monotonic() < until:
        if gone := [name for name, entry in nodes.items() if not alive(entry)]:
            raise OwlError(f"{gone[0]} did not start; see its log, {gone[0]}.log in the cluster's folder")
        with suppress(Exception):  # the dashboard comes up after the head, and says so in many ways
            if len([node for node in list_nodes(known["dashboard"]) if node.state == "ALIVE"]) >= len(nodes):
                return
        time.sleep(0.5)
    raise OwlError(f"the cluster did not come up within {COMES_UP_WITHIN} s; see the logs in its folder")


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
