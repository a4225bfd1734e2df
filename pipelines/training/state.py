"""What a run needs to go on: weights and optimizer of what trains, the position, random states.

Saved with torch.distributed.checkpoint by every rank into its own folder, which Ray Train merges into
RUN/checkpoints/step_N; loaded into any number of workers, whole or in parts. Writing and uploading go on beside
training. A rank's part is sealed by the hashes of its files, so that a resumed run takes the newest checkpoint that is
whole, also where the driver died before it had heard of it.
"""

from __future__ import annotations

import hashlib
import pickle
import random
import shutil
import tempfile
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.fs
import ray.train
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ray.train import Checkpoint, CheckpointUploadMode
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from pipelines import storage

OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def gather(model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int, history: list[dict]) -> dict[str, Any]:
    states = {str(i): optimizer.state_dict() for i, optimizer in enumerate(optimizers)}
    rest = {"step": step, "history": history, "numpy": np.random.get_state(), "python": random.getstate()}
    return {
        "model": get_model_state_dict(model, options=OPTIONS),
        "optimizers": states,
        "torch_random": torch.get_rng_state(),
        # In one piece: lists are otherwise saved item by item, and then only load into lists of the same length.
        "rest": pickle.dumps(rest),
    }


def gather_whole(model: nn.Module) -> dict[str, Any]:
    """What trains, put together on rank 0 from the parts that every rank holds; every rank calls it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
    return get_model_state_dict(model, options=options)


def set_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    set_model_state_dict(model, weights, options=OPTIONS)


class Saver:
    """Saves and restores the checkpoints of one worker. At most one is on its way at a time."""

    def __init__(self, run: str, model: nn.Module, optimizers: list[torch.optim.Optimizer], at_once: bool = False):
        self.run, self.model, self.optimizers, self.at_once = run, model, optimizers, at_once
        context = ray.train.get_context()
        self.rank, self.world, self.storage = context.get_world_rank(), context.get_world_size(), context.get_storage()
        # Its own group: its messages pass between those of training, and between CPUs.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.arrived = threading.Event()
        self.arrived.set()
        # One place for each worker of a run, so that what killed ones leave there goes when they come back.
        name = f"owl-checkpoint-{hashlib.sha256(run.encode()).hexdigest()[:16]}-{self.rank}"
        self.here = Path(tempfile.gettempdir(), name)
        shutil.rmtree(self.here, ignore_errors=True)
        on_gpu = torch.cuda.is_available()
        self.stager = DefaultStager(StagingOptions(on_gpu, False, False, on_gpu))

    def save(self, metrics: dict, step: int, history: list[dict], validation: Any = False) -> None:
        """Copies the state, and has it written and uploaded while training goes on; or, ``at_once``, waits for that.
        Every rank calls it."""
        self.arrived.wait()
        self.arrived.clear()
        folder = self.here / str(step)
        folder.mkdir(parents=True, exist_ok=True)
        state = gather(self.model, self.optimizers, step, history)
        given = {"checkpoint_id": folder, "process_group": self.group, "async_stager": self.stager}
        writing = cast("Future", dcp.async_save(state, no_dist=self.group is None, **given))

        def upload(checkpoint: Checkpoint, name: str) -> Checkpoint:
            try:
                writing.result()
                seal(folder, self.rank, self.world)
                return self.upload(folder, name)
            finally:
                self.arrived.set()

        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"step_{step:08d}",
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
            checkpoint_upload_fn=upload,
            validation=validation,
        )
        if self.at_once:
            self.arrived.wait()

    def upload(self, folder: Path, name: str) -> Checkpoint:
        """The seal goes last: without it, a part does not count."""
        target, files = f"{self.storage.experiment_fs_path}/{name}", self.storage.storage_filesystem
        files.create_dir(target)
        for path in sorted(folder.iterdir(), key=lambda path: path.suffix == ".json"):
            pyarrow.fs.copy_files(str(path), f"{target}/{path.name}", destination_filesystem=files)
        return Checkpoint(target, files)

    def restore(self) -> tuple[int, list[dict]]:
        """Loads the run's newest checkpoint that is whole; returns the steps done and the losses logged so far.
        Every rank calls it."""
        name = [self.newest() if self.rank == 0 else None]
        if self.group is not None:
            dist.broadcast_object_list(name, src=0, group=self.group)
        if name[0] is None:
            return 0, []
        with self.checkpoint(name[0]).as_directory() as folder:
            prime(self.optimizers)
            state = gather(self.model, self.optimizers, 0, [])
            dcp.load(state, checkpoint_id=folder, process_group=self.group, no_dist=self.group is None)
        set_weights(self.model, state["model"])
        for index, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state["optimizers"][str(index)])
        torch.set_rng_state(state["torch_random"])
        rest = pickle.loads(state["rest"])
        np.random.set_state(rest["numpy"])
        random.setstate(rest["python"])
        return rest["step"], rest["history"]

    def newest(self) -> str | None:
        for path in reversed(storage.listing(f"{self.run}/checkpoints", "")):
            name = storage.name_of(path)
            if name.startswith("step_"):
                with self.checkpoint(name).as_directory() as folder:
                    if is_whole(Path(folder)):
                        return name
        return None

    def checkpoint(self, name: str) -> Checkpoint:
        return Checkpoint(f"{self.storage.experiment_fs_path}/{name}", self.storage.storage_filesystem)


def seal(folder: Path, rank: int, world: int) -> None:
    """Writes down what a rank's part of a checkpoint consists of."""
    files = {path.name: storage.sha256(str(path)) for path in sorted(folder.iterdir())}
    storage.write_json(f"{folder}/rank_{rank}.json", {"world": world, "files": files})


def is_whole(folder: Path) -> bool:
    """Whether every rank's part is there, as it was written."""
    if not (folder / "rank_0.json").exists():
        return False
    parts = [folder / f"rank_{rank}.json" for rank in range(storage.read_json(f"{folder}/rank_0.json")["world"])]
    if not all(part.exists() for part in parts):
        return False
    files = {name: digest for part in parts for name, digest in storage.read_json(str(part))["files"].items()}
    paths = {folder / name: digest for name, digest in files.items()}
    return all(path.exists() and storage.sha256(str(path)) == digest for path, digest in paths.items())


def prime(optimizers: list[torch.optim.Optimizer]) -> None:
    """Gives the optimizers the state tensors that loading fills: one step with zero gradients and zero rate."""
    for optimizer in optimizers:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
