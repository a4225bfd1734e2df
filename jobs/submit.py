"""`owl submit`: a verb as a Ray job on a cluster; `owl jobs`: what became of it.

A job has a name, and its attempts are NAME, NAME-2, …: Ray takes a submission id once. Since every verb goes on where
it was stopped, submitting the same name again resumes it, and one that runs is followed instead of started twice."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from jobs.options import AsJson, console, finish, pairs_of
from jobs.session import prepare_environment
from pipelines.settings import OwlError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

app = typer.Typer()
jobs = typer.Typer(invoke_without_command=True, help="The jobs of a cluster; without a command, a list of them.")

Address = Annotated[
    str, typer.Option("--address", envvar="RAY_ADDRESS", help="The cluster's dashboard, http://host:8265.")
]
HERE = "http://127.0.0.1:8265"
VERBS = ("curate", "train", "eval", "batch", "convert", "doctor", "demo", "bench")
"""Verbs that end. An endpoint does not: `owl serve --config FILE` deploys one."""
EXCLUDED = [".git", ".venv", ".vllm", ".s3", ".clients", ".rivals", ".oldest", "owl-demo", "owl-cluster", "runs"]
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def submit(
    verb: Annotated[str, typer.Argument(help=f"One of {', '.join(VERBS)}; leave it out to resume --name.")] = "",
    arguments: Annotated[list[str] | None, typer.Argument(help="All that the verb takes.")] = None,
    name: Annotated[str, typer.Option("--name", help="The job's name; the same again resumes it.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Also where the job of that name has succeeded.")] = False,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Show its log, and end with its status.")] = True,
    retries: Annotated[int, typer.Option("--retries", help="How often a job whose node died is resumed.", min=0)] = 3,
    cpus: Annotated[float | None, typer.Option("--cpus", help="CPUs for the job's own process.")] = None,
    memory: Annotated[float | None, typer.Option("--memory", help="GB for the job's own process.")] = None,
    env: Annotated[list[str] | None, typer.Option("--env", help="NAME=VALUE, or NAME for its value here.")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", help="KEY=VALUE for the job's metadata.")] = None,
    code: Annotated[
        Path | None, typer.Option("--code", help="A checkout that is sent along and runs instead of the image's Owl.")
    ] = None,
    lock: Annotated[
        bool, typer.Option("--lock", help="With --code: installs what its constraints.txt pins, for this job.")
    ] = False,
    address: Address = HERE,
    as_json: AsJson = False,
) -> None:
    """Runs a verb as a job on a cluster: owl submit --name nightly curate 's3://raw/*.tar' --out s3://data/pairs."""
    client = client_of(address)
    asked = [verb, *(arguments or [])] if verb else None
    if asked:
        refuse_no_job(asked)
    name = name or f"{verb or 'job'}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    environment = runtime_environment(code, lock, env or [])
    metadata = pairs_of(label or [], "--label") | {"owl": version("owl-vlm"), "name": name}
    given = {"runtime_env": environment, "entrypoint_num_cpus": cpus, "metadata": metadata}
    given["entrypoint_memory"] = int(memory * 2**30) if memory else None
    while True:
        job = begin(client, name, asked, again, given)
        if not follow:
            console.print(f"Job {job}. owl jobs follow {job} shows its log.")
            return finish({"job": job}, as_json, lambda: None)
        console.print(f"Job {job} at {address}. Ctrl-C leaves it running.", soft_wrap=True)
        told = tail(client, job, quiet=as_json)
        if not (died(told) and retries):
            break
        retries -= 1
        console.print(f"Job {job} was lost: {told.message}. It goes on.")
    finish({"job": job, "status": told.status, "seconds": seconds(told)}, as_json, lambda: None)
    end_as(told, job)


def begin(client: JobSubmissionClient, name: str, asked: list[str] | None, again: bool, given: dict[str, Any]) -> str:
    """Submits the next attempt of a job, or finds the one that is running. Returns its submission id. Raises OwlError
    where the name belongs to another command."""
    before = attempts(client, name)
    entrypoint = shlex.join(["python", "-m", "jobs.cli", *asked]) if asked else ""
    if not before and not asked:
        raise OwlError(f"there is no job {name} to resume; name a verb: {', '.join(VERBS)}")
    if before:
        last = before[-1]
        entrypoint = entrypoint or last.entrypoint
        if last.entrypoint != entrypoint:
            raise OwlError(f"job {name} is {last.entrypoint!r}, not {entrypoint!r}; give it another --name")
        if last.status not in ENDED:
            return str(last.submission_id)
        if last.status == "SUCCEEDED" and not again:
            return str(last.submission_id)
    job = name if not before else f"{name}-{len(before) + 1}"
    metadata = given["metadata"] | {"attempt": str(len(before) + 1)}
    try:
        client.submit_job(entrypoint=entrypoint, submission_id=job, **{**given, "metadata": metadata})
    except RuntimeError as error:  # somebody was quicker with the same name
        if "already exists" not in str(error):
            raise OwlError(f"the cluster refused the job: {first_line(error)}") from None
    return job


def attempts(client: JobSubmissionClient, name: str) -> list[JobDetails]:
    """All attempts of a job, oldest first."""
    mine = [job for job in client.list_jobs() if (job.metadata or {}).get("name") == name]
    return sorted(mine, key=lambda job: int(job.metadata["attempt"]))


def refuse_no_job(asked: Sequence[str]) -> None:
    verb, *_ = asked
    if verb == "serve":
        raise OwlError("an endpoint is no job: owl serve --config FILE deploys one to the cluster")
    if verb not in VERBS:
        raise OwlError(f"{verb!r} is no job; these are: {', '.join(VERBS)}")


def runtime_environment(code: Path | None, lock: bool, env: Sequence[str]) -> dict[str, Any]:
    environment: dict[str, Any] = {"env_vars": environment_of(env)}
    if lock and not code:
        raise OwlError("--lock takes what constraints.txt pins from a checkout: name it with --code")
    if code:
        if not (code / "jobs/cli.py").exists():
            raise OwlError(f"{code} is no checkout of Owl: it has no jobs/cli.py")
        environment |= {"working_dir": str(code), "excludes": EXCLUDED}
    if code and lock:
        pinned = [line.strip() for line in (code / "constraints.txt").read_text().splitlines()]
        wanted = [line for line in pinned if line and not line.startswith(("#", "ray=="))]  # Ray is the cluster's own
        environment["pip"] = {"packages": wanted, "pip_check": False}
    return environment


def environment_of(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals and name not in os.environ:
            raise OwlError(f"--env {name}: it has no value here; give one as {name}=VALUE")
        found[name] = value if equals else os.environ[name]
    return found


@jobs.callback()
def listed(context: typer.Context, address: Address = HERE, as_json: AsJson = False) -> None:
    """The cluster's jobs, newest first."""
    if context.invoked_subcommand:
        return
    found = sorted(client_of(address).list_jobs(), key=lambda job: job.start_time or 0, reverse=True)
    mine = [job for job in found if job.submission_id]
    told = [{"job": j.submission_id, "status": j.status, "seconds": seconds(j), "command": j.entrypoint} for j in mine]

    def show() -> None:
        table = Table("job", "status", "seconds", "command", box=None)
        for job in told:
            table.add_row(job["job"], job["status"], f"{job['seconds']:,}", job["command"])
        console.print(table)

    finish({"jobs": told}, as_json, show)


JobName = Annotated[str, typer.Argument(help="The job's name, or one attempt's.")]


@jobs.command("follow")
def follow_job(job: JobName, address: Address = HERE) -> None:
    """Shows a job's log from its beginning until it ends, and ends with its status."""
    client = client_of(address)
    found = attempt_of(client, job)
    end_as(tail(client, found), found)


@jobs.command("stop")
def stop_job(job: JobName, address: Address = HERE) -> None:
    """Stops a job. Submitted again under its name, it goes on from there."""
    client = client_of(address)
    found = attempt_of(client, job)
    if not client.stop_job(found):
        raise OwlError(f"job {found} does not run: {client.get_job_status(found)}")
    until = time.monotonic() + 60
    while client.get_job_status(found) not in ENDED and time.monotonic() < until:
        time.sleep(0.5)
    console.print(f"Job {found}: {client.get_job_status(found)}")


def attempt_of(client: JobSubmissionClient, job: str) -> str:
    """The last attempt of a name, or that very one. Raises OwlError for one that is not there."""
    if named := attempts(client, job):
        return str(named[-1].submission_id)
    if job not in {found.submission_id for found in client.list_jobs()}:
        raise OwlError(f"there is no job {job}; `owl jobs` lists them")
    return job


def client_of(address: str) -> JobSubmissionClient:
    prepare_environment()
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)

    if not address.startswith(("http://", "https://")):
        raise OwlError(f"{address} is no dashboard: jobs are sent to one, such as {HERE} (--address or RAY_ADDRESS)")
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise OwlError(f"no cluster answers at {address}: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def tail(client: JobSubmissionClient, job: str, quiet: bool = False) -> JobDetails:
    """Prints a job's log as it comes until it has ended; what the connection loses is asked for again."""

    shown = 0

    async def lines() -> None:
        """From where the last connection broke: the log itself always comes from its beginning."""
        nonlocal shown
        came = 0
        async for text in client.tail_job_logs(job):
            new, came = text[max(0, shown - came) :], came + len(text)
            if new and not quiet:
                sys.stdout.write(new)
                sys.stdout.flush()
            shown = max(shown, came)

    while True:
        try:
            asyncio.run(lines())
            while (told := client.get_job_info(job)).status not in ENDED:  # its log has ended; it soon has, too
                time.sleep(0.5)
            return told
        except (ConnectionError, RuntimeError):
            time.sleep(1)
        except KeyboardInterrupt:
            console.print(f"\nJob {job} goes on. owl jobs follow {job} shows it, owl jobs stop {job} ends it.")
            raise typer.Exit(130) from None


def died(job: JobDetails) -> bool:
    """Whether a job was lost with its node, rather than ended by itself or by somebody."""
    return job.status == "FAILED" and job.driver_exit_code is None


def seconds(job: JobDetails) -> int:
    """How long a job ran, or has run."""
    end = job.end_time or time.time() * 1000
    return round((end - job.start_time) / 1000) if job.start_time else 0


def end_as(job: JobDetails, name: str) -> None:
    if job.status != "SUCCEEDED":
        why = (job.message or "").partition(", last available logs")[0]  # they were shown
        raise OwlError(f"job {name}: {job.status}{f', {why}' if why else ''}")
