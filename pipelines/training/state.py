"""What a run needs to go on: weights and optimizer of what trains, the position, random states, the settings.

Saved with torch.distributed.checkpoint by every rank into its own folder, which Ray Train merges; loaded into any
number of workers.
"""

from __future__ import annotations

import pickle
import random
import tempfile
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

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


def save(metrics: dict, model: nn.Module, optimizers: list, step: int, history: list[dict]) -> None:
    """Reports a checkpoint of this step to Ray Train; every rank calls it."""
    folder = tempfile.mkdtemp(prefix="owl-checkpoint-")
    dcp.save(gather(model, optimizers, step, history), checkpoint_id=folder)
    ray.train.report(
        metrics,
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_dir_name=f"step_{step:08d}",
        delete_local_checkpoint_after_upload=True,
    )


def restore(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[int, list[dict]]:
    """Loads the run's last checkpoint, if it has one; returns the steps done and the losses logged so far."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0, []
    with checkpoint.as_directory() as folder:
        prime(optimizers)
        state = gather(model, optimizers, 0, [])
        dcp.load(state, checkpoint_id=folder)
    set_weights(model, state["model"])
    for index, optimizer in enumerate(optimizers):
        optimizer.load_state_dict(state["optimizers"][str(index)])
    torch.set_rng_state(state["torch_random"])
    rest = pickle.loads(state["rest"])
    np.random.set_state(rest["numpy"])
    random.setstate(rest["python"])
    return rest["step"], rest["history"]


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
