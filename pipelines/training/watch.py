"""What a run tells of itself while it goes on: one entry a few steps, to its history, TensorBoard, Ray's metrics, and
to W&B or MLflow where asked for."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from ray.util.metrics import Gauge

from pipelines import storage
from pipelines.training.step import COUNTS

PATCHES = 257
"""Visual tokens that a picture is in its encoder, where the encoder does not say."""


class Tracker(Protocol):
    def log(self, values: dict[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class Clock:
    """Where the time of steps goes: waiting for data, writing checkpoints, and computing, which is the rest."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.began, self.spent = time.monotonic(), dict.fromkeys(("wait", "checkpoint"), 0.0)

    def spend(self, what: str, since: float) -> None:
        self.spent[what] += time.monotonic() - since

    def shares(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self.began, 1e-9)
        shares = {what: spent / seconds for what, spent in self.spent.items()}
        return {"seconds": seconds, **shares, "compute": 1 - sum(shares.values())}


def operations(parameters: dict[str, dict[str, int]], tokens: int, pictures: int, patches: int) -> float:
    """Multiplications and additions of a step by the usual count: 2 for each weight and token on the way forward, as
    many for the gradient of what trains, and as many for the gradient that passes through to what trains before it;
    attention scores are left out. ``parameters`` as of stages.count_parameters."""
    total, behind = 0.0, False  # whether something before this part trains
    for name, count in parameters.items():
        seen = tokens if name == "language" else pictures * patches
        trains = count["trainable"]
        total += seen * 2 * (count["total"] + trains + (count["total"] if behind else 0))
        behind = behind or trains > 0
    return total


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the best of some multiplications of square matrices: the peak a step is held against."""
    side = 8192 if device.type == "cuda" else 1024
    one, two = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        began = time.monotonic()
        product = one @ two
        product[0, 0].item()  # waits for it
        best = min(best, time.monotonic() - began)
    return 2 * side**3 / best


class RayMetrics:
    """Prometheus gauges that Ray exports, owl_train_*, by run."""

    def __init__(self, run: str, names: dict[str, str]):
        self.run = storage.name_of(run)
        self.gauges = {name: Gauge(f"owl_train_{name}", text, tag_keys=("run",)) for name, text in names.items()}

    def log(self, values: dict[str, float], step: int) -> None:
        for name, gauge in self.gauges.items():
            if name in values:
                gauge.set(values[name], tags={"run": self.run})

    def close(self) -> None:
        return None


GAUGES = {
    "step": "Steps done",
    "loss": "Loss a supervised token of the global batch, in nats",
    "gradient_norm": "Norm of the gradient before clipping",
    "tokens_per_second": "Tokens a second, over all workers",
    "pictures_per_second": "Pictures a second, over all workers",
    "wait": "Share of time that worker 0 waited for data",
    "checkpoint": "Share of time that worker 0 waited for checkpoints",
    "compute": "Share of time that worker 0 computed",
    "share_of_peak": "Operations a second as a share of what worker 0's matrices reach",
}


class TensorBoard:
    """Event files in RUN/tensorboard; on this machine first where the run is elsewhere, and copied there."""

    def __init__(self, run: str):
        from tensorboardX import SummaryWriter

        self.target = f"{run}/tensorboard"
        self.folder = self.target if "://" not in run else tempfile.mkdtemp(prefix="owl-tensorboard-")
        self.writer = SummaryWriter(self.folder)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()
        if self.folder != self.target:
            storage.write_folder(self.folder, self.target)


class Wandb:
    def __init__(self, run: str):
        import wandb

        known = hashlib.sha256(run.encode()).hexdigest()[:16]  # by the whole path: many runs end in "stage1"
        self.run = wandb.init(project="owl", name=storage.name_of(run), id=known, resume="allow")

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class Mlflow:
    def __init__(self, run: str):
        import mlflow

        self.mlflow = mlflow
        wanted = f"tags.`owl.run` = '{run}'"
        before = mlflow.search_runs(filter_string=wanted, max_results=1, output_format="list")
        if before:
            mlflow.start_run(run_id=before[0].info.run_id)
        else:
            mlflow.start_run(run_name=storage.name_of(run), tags={"owl.run": run})

    def log(self, values: dict[str, float], step: int) -> None:
        self.mlflow.log_metrics(values, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


TRACKERS: dict[str, Callable[[str], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}


def trackers(run: str, names: Sequence[str]) -> list[Tracker]:
    return [RayMetrics(run, GAUGES), *(TRACKERS[name](run) for name in names)]


def scalars(entry: dict[str, Any]) -> dict[str, float]:
    """An entry's numbers under flat names: losses by dataset, norms by module."""
    flat: dict[str, float] = {}
    for name, value in entry.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{storage.name_of(key)}": number for key, number in value.items() if number is not None}
        elif isinstance(value, int | float):
            flat[name] = value
    return flat


class Diary:
    """What happens between two entries of a run's history, and the entries. ``history`` is written on in place."""

    def __init__(self, history: list[dict], data: list[str], watched: Sequence[Tracker]):
        self.history, self.data, self.watched = history, data, watched
        self.clock, self.sums = Clock(), Counter[str]()
        self.seen = Counter({name: history[-1][name] for name in SINCE_THE_START} if history else {})

    def count(self, metrics: dict[str, Any]) -> None:
        """Takes a step's counts out of its metrics, and adds them up."""
        counted = {name: metrics.pop(name) for name in COUNTS}
        self.sums.update(counted)
        self.seen.update({name: counted[name] for name in SINCE_THE_START})

    def write(self, step: int, metrics: dict[str, Any], rate: float, seconds_at_peak: float) -> None:
        """An entry; ``seconds_at_peak`` is how long its operations would take at the matrices' rate."""
        shares, sums = self.clock.shares(), self.sums
        seconds = shares["seconds"]
        losses = dict(zip(self.data, metrics["losses"], strict=True))
        entry = {
            "step": step,
            **metrics,
            "losses": losses,
            "rate": rate,
            **self.seen,
            **shares,
            "tokens_per_second": sums["tokens"] / seconds,
            "pictures_per_second": sums["pictures"] / seconds,
            "padding": sums["padding"] / max(1, sums["tokens"] + sums["padding"]),
            "supervised": sums["supervised"],
            "share_of_peak": seconds_at_peak / seconds,
        }
        self.history.append(entry)
        for tracker in self.watched:
            tracker.log(scalars(entry), step)
        self.clock.restart()
        self.sums.clear()

    def close(self) -> None:
        for tracker in self.watched:
            tracker.close()


SINCE_THE_START = ("unsupervised", "cut")
"""Counts that entries tell of the whole run."""
