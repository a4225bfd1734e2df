"""One stage of training on Ray Train: curated datasets and a model folder in, a model folder out.

A run has a name. Run again under the same name it goes on from its last checkpoint; finished, it returns at once.
"""

from __future__ import annotations

import json
import logging
import os
from importlib.util import find_spec
from itertools import count
from typing import Any

from ray.exceptions import RayActorError
from ray.train import (
    CheckpointConfig,
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    ValidationConfig,
    ValidationTaskConfig,
)
from ray.train.torch import TorchTrainer

from pipelines import storage
from pipelines.curation import ledger
from pipelines.progress import progress
from pipelines.settings import OwlError, differences, flat
from pipelines.training.dataset import Dataset
from pipelines.training.loop import work
from pipelines.training.report import write_report
from pipelines.training.stages import Stage
from pipelines.training.validate import validate

log = logging.getLogger(__name__)


def train(stage: str, settings: Stage, run: str) -> dict:
    """Trains ``stage`` in the folder ``run``, local or remote; returns what was logged: parameters by module, the
    losses, and how many samples of each dataset were used.

    A dataset is read in the version that it has when the run begins, also when the run goes on later. The model is
    written to ``run``/model. Raises OwlError where the run's folder belongs to other settings, or where data or
    starting model are missing."""
    run = run if "://" in run else os.path.abspath(run)
    settings = pinned(settings, run)
    refuse_other_settings(run, stage, settings)
    if storage.exists(f"{run}/model/finished"):
        return told(stage, settings, run)
    start = model_folder(settings.start)
    if missing := [name for name in settings.trackers if not find_spec(PACKAGES[name])]:
        raise OwlError(f"trackers {missing[0]} needs a package that is not installed: pip install {missing[0]}")
    samples = sum(Dataset([*settings.data, *settings.validation]).rows)
    log.info("%s: %d samples, %d steps of %d", stage, samples, settings.steps, settings.batch_size)
    with progress(stage, settings.steps, "steps") as counter:
        config = {"stage": stage, "settings": settings.model_dump(), "run": run, "start": start, "counter": counter}
        try:
            fit_again(config, settings, run)
        except TrainingFailedError as error:
            for failure in getattr(error, "worker_failures", {}).values():
                if isinstance(failure, OwlError):
                    raise OwlError(f"{stage} stopped: {failure}") from None
            raise
    return told(stage, settings, run)


def told(stage: str, settings: Stage, run: str) -> dict:
    """A finished run's log; its report is written where a killed driver did not come to it."""
    logged = storage.read_json(f"{run}/log.json")
    if not storage.exists(f"{run}/report.html"):
        write_report(f"{run}/report.html", stage, settings, run, logged)
    return logged


def model_folder(start: str) -> str:
    """Where a model folder lies: at ``start``, or in the run of that name. Raises OwlError where there is none."""
    for folder in (start, f"{start}/model"):
        if start and storage.exists(f"{folder}/config.json"):
            return os.path.abspath(folder) if "://" not in folder else folder
    raise OwlError(f"no model folder to begin from at {start!r}: it has no config.json")


def fit_again(config: dict[str, Any], settings: Stage, run: str) -> None:
    """Ray Train starts again where a worker dies at its work, but gives up where one dies while its group still
    starts."""
    for failures in count(1):
        try:
            fit(config, settings, run)
            return
        except ControllerError as error:
            if not isinstance(error.controller_failure, RayActorError) or failures > settings.max_failures:
                raise
            log.warning("a worker died while training started: %s", error.controller_failure)


def fit(config: dict[str, Any], settings: Stage, run: str) -> None:
    resources = {"CPU": settings.cpus_per_worker}
    if settings.gpus_per_worker:
        resources["GPU"] = settings.gpus_per_worker
    elastic = 0 < settings.min_workers < settings.workers
    validation = {name: config[name] for name in ("stage", "settings", "run", "start")}
    trainer = Trainer(
        work,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=(settings.min_workers, settings.workers) if elastic else settings.workers,
            use_gpu=settings.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=run,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=settings.keep_checkpoints,
                checkpoint_score_attribute=settings.keep_by or None,
                checkpoint_score_order="min",
            ),
        ),
        validation_config=ValidationConfig(
            fn=validate,
            task_config=ValidationTaskConfig(fn_kwargs=validation),
            ray_remote_kwargs={"num_cpus": settings.cpus_per_worker, "num_gpus": settings.gpus_per_worker},
        )
        if settings.validate_every
        else None,
    )
    trainer.fit()


class Trainer(TorchTrainer):
    """Ray Train's, without its handler of Ctrl-C: that one stays for the rest of the process and ends it with status
    0 or 1, where the caller has to learn that the run was stopped."""

    def _register_sigint_handler(self, controller) -> None:
        pass


PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


def begun_with(run: str) -> tuple[str, dict[str, str]]:
    """The stage and the settings of a run, as `--set` takes them. Raises OwlError where no run was begun."""
    path = f"{run}/settings.json"
    if not storage.exists(path):
        raise OwlError(f"no run was begun at {run}: it has no settings.json")
    settings = storage.read_json(path)
    stage = settings.pop("stage")
    flattened = flat(settings)
    return stage, {name: value if isinstance(value, str) else json.dumps(value) for name, value in flattened.items()}


def pinned(settings: Stage, run: str) -> Stage:
    """The settings with a version for each dataset: that with which the run began, else the last one."""
    path = f"{run}/settings.json"
    before = storage.read_json(path) if storage.exists(path) else {}
    began = {
        plain: name for key in ("data", "validation") for name in before.get(key, []) for plain in [versionless(name)]
    }
    return settings.model_copy(
        update={
            key: [began.get(name) or with_version(name) for name in getattr(settings, key)]
            for key in ("data", "validation")
        }
    )


def with_version(dataset: str) -> str:
    folder, version = ledger.folder_and_version(dataset)
    version = version or ledger.manifest_of(folder).get("version")
    return f"{folder}@{version}" if version else dataset


def versionless(dataset: str) -> str:
    return ledger.folder_and_version(dataset)[0]


WHERE = {
    "workers",
    "min_workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "max_failures",
    "sharding",
    "checkpoint_beside",
    "keep_checkpoints",
    "keep_megabytes",
    "cache_gigabytes",
    "trackers",
    "log_keys",
}
"""Settings that say where to run and what to tell, and change nothing of what is learnt."""


def refuse_other_settings(run: str, stage: str, settings: Stage) -> None:
    """A run's folder holds one stage with one set of settings. What only says where to run may change."""
    path = f"{run}/settings.json"
    now = {"stage": stage, **settings.model_dump(mode="json", exclude=WHERE)}
    if storage.exists(path) and (changed := differences(storage.read_json(path), now)):
        raise OwlError(f"the run at {run} has other settings ({changed}); give it another name or remove it")
    storage.write_json(path, now)
