"""One stage of training on Ray Train: curated datasets and a model folder in, a model folder out.

A run has a name. Run again under the same name it goes on from its last checkpoint; finished, it returns at once.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from pipelines import storage
from pipelines.progress import progress
from pipelines.settings import OwlError, differences
from pipelines.training.feed import Dataset
from pipelines.training.loop import work
from pipelines.training.stages import Stage

log = logging.getLogger(__name__)


def train(stage: str, settings: Stage, run: str) -> dict:
    """Trains ``stage`` in the folder ``run``; returns what was logged: parameters by module, and the losses.

    The model is written to ``run``/model. Raises OwlError where the run's folder belongs to other settings, or where
    data or starting model are missing.
    """
    run = run if "://" in run else os.path.abspath(run)
    path, model = f"{run}/log.json", f"{run}/model"
    refuse_other_settings(run, stage, settings)
    if storage.exists(f"{model}/finished"):
        return storage.read_json(path)
    if not storage.exists(f"{settings.start}/config.json"):
        raise OwlError(f"no model folder to begin from at {settings.start!r}: it has no config.json")
    samples = sum(Dataset(settings.data).rows)
    log.info("%s: %d samples, %d steps of %d", stage, samples, settings.steps, settings.batch_size)
    with progress(stage, settings.steps, "steps") as counter:
        config = {
            "stage": stage,
            "settings": settings.model_dump(),
            "start": os.path.abspath(settings.start) if "://" not in settings.start else settings.start,
            "finish": model,
            "log": path,
            "counter": counter,
        }
        result = fit(config, settings, run)
    if result.error is not None:
        raise OwlError(f"{stage} stopped: {result.error}")
    return storage.read_json(path)


def fit(config: dict[str, Any], settings: Stage, run: str) -> ray.train.Result:
    resources = {"CPU": settings.cpus_per_worker}
    if settings.gpus_per_worker:
        resources["GPU"] = settings.gpus_per_worker
    trainer = Trainer(
        work,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=settings.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=run,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    return trainer.fit()


class Trainer(TorchTrainer):
    """Ray Train's, without its handler of Ctrl-C: that one stays for the rest of the process and ends it with status
    0 or 1, where the caller has to learn that the run was stopped."""

    def _register_sigint_handler(self, controller) -> None:
        pass


def refuse_other_settings(run: str, stage: str, settings: Stage) -> None:
    """A run's folder holds one stage with one set of settings. What only says where to run may change."""
    path = f"{run}/settings.json"
    place = {"workers", "cpus_per_worker", "gpus_per_worker", "max_failures", "keep_megabytes"}
    now = {"stage": stage, **settings.model_dump(mode="json", exclude=place)}
    if storage.exists(path) and (changed := differences(storage.read_json(path), now)):
        raise OwlError(f"the run at {run} has other settings ({changed}); give it another name or remove it")
    storage.write_json(path, now)
