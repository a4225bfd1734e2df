"""One optimizer step: the loss summed over all supervised tokens of the global batch, divided by their number."""

from __future__ import annotations

import contextlib
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pipelines.settings import OwlError
from pipelines.training.feed import Batch
from pipelines.training.stages import Optimization


def build_optimizers(model: nn.Module, settings: Optimization) -> list[torch.optim.Optimizer]:
    """Optimizers of what trains. Muon takes two-dimensional weights of hidden layers only, as its authors advise."""
    groups: dict[tuple[str, float], list[nn.Parameter]] = defaultdict(list)
    depths = vision_depths(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim >= 2 and not any(part in name for part in ("embed", "token", "lm_head", "vit_eos"))
        hidden = matrix and parameter.ndim == 2 and settings.optimizer == "muon"
        kind = "muon" if hidden else "decay" if matrix else "plain"
        groups[kind, settings.layer_decay ** depths.get(name, 0)].append(parameter)
    adamw: list[dict[str, Any]] = []
    muon: list[dict[str, Any]] = []
    for (kind, scale), parameters in sorted(groups.items(), key=lambda item: item[0]):
        decay = 0.0 if kind == "plain" else settings.weight_decay
        rate = scale * (settings.muon_rate if kind == "muon" else settings.learning_rate)
        (muon if kind == "muon" else adamw).append({"params": parameters, "weight_decay": decay, "lr": rate})
    optimizers: list[torch.optim.Optimizer] = []
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, betas=settings.betas, eps=settings.epsilon))
    if muon:
        optimizers.append(torch.optim.Muon(muon, momentum=settings.muon_momentum))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


LAYER = re.compile(r"vision_model\.(?:.*\.)?(?:layers?|blocks|stages|features)\.(\d+)\.")


def vision_depths(model: nn.Module) -> dict[str, int]:
    """How many layers of the vision encoder lie between a weight of it and what follows the last one."""
    names = [name for name, _ in model.named_parameters() if "vision_model." in name]
    layers = {name: int(found[1]) for name in names if (found := LAYER.search(name))}
    count = max(layers.values(), default=-1) + 1
    before = {name: count + 1 for name in names if name not in layers and "embed" in name}
    return {**before, **{name: count - layer for name, layer in layers.items()}}


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak rate at a step, 0 … steps - 1: linear warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@contextlib.contextmanager
def gradients_shared(model: nn.Module, share: bool) -> Iterator[None]:
    """Within it, ranks exchange gradients only if asked to: once a step is enough."""
    if isinstance(model, DistributedDataParallel) and not share:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(share)
    yield


class NonFinite(OwlError):
    """The loss or the gradient is not a number; the optimizer has not moved."""


def train_step(
    model: nn.Module,
    batches: list[Batch],
    optimizers: list[torch.optim.Optimizer],
    settings: Optimization,
    rate: float,
    precision: torch.dtype = torch.float32,
    datasets: int = 1,
    modules: dict[str, list[nn.Module]] | None = None,
) -> dict[str, Any]:
    """Forward and backward over this rank's micro-batches, and one move of the optimizers at ``rate`` times their peak.
    Returns the global loss, and over all ranks the loss by dataset, the gradient's norm, and how many tokens,
    supervised tokens, pictures, … there were (COUNTS); with ``modules``, the gradient's norm in each. Raises NonFinite,
    naming this rank's samples, before the optimizers move."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    device = next(model.parameters()).device
    counts = torch.tensor([[getattr(batch, name) for name in COUNTS] for batch in batches], dtype=torch.float64)
    counts = summed(counts.sum(dim=0), device)
    supervised = counts[COUNTS.index("supervised")].clamp(min=1)
    by_dataset = torch.zeros(2, datasets, dtype=torch.float64, device=device)  # losses and tokens
    for batch in batches:
        inputs = {name: value.to(device, non_blocking=True) for name, value in batch.inputs.items()}
        sources = batch.datasets.to(device, non_blocking=True)
        last = batch is batches[-1]
        with gradients_shared(model, last), torch.autocast(device.type, precision, precision != torch.float32):
            # Data parallelism averages gradients over ranks: times the world over the global count is the global mean.
            out = model(**inputs, num_items_in_batch=(supervised / world).to(device, torch.float32))
        with gradients_shared(model, last):
            out.loss.backward()
        by_dataset[0].index_add_(0, sources, out.token_losses.double())
        by_dataset[1].index_add_(0, sources, torch.ones_like(out.token_losses, dtype=torch.float64))
    weights = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    norms = norms_by_module(modules or {})
    norm = whole(nn.utils.clip_grad_norm_(weights, settings.clip)).item()
    losses, tokens = summed(by_dataset, device)
    loss = (losses.sum() / supervised).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        keys = ", ".join(key for batch in batches for key in batch.keys)
        raise NonFinite(f"loss {loss}, gradient norm {norm}; this rank held {keys}")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {
        "loss": loss,
        "gradient_norm": norm,
        "norms": norms,
        "losses": [round((a / b).item(), 6) if b else None for a, b in zip(losses, tokens, strict=True)],
        **dict(zip(COUNTS, counts.long().tolist(), strict=True)),
    }


COUNTS = ("supervised", "unsupervised", "cut", "tokens", "padding", "pictures")


def summed(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Over all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        values = values.to(device)
        dist.all_reduce(values)
    return values.cpu()


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def norms_by_module(modules: dict[str, list[nn.Module]]) -> dict[str, float]:
    """Norm of the gradient of each module that trains; every rank calls it, between backward and the optimizer."""
    found = {}
    for name, members in modules.items():
        gradients = [p.grad for module in members for p in module.parameters() if p.grad is not None]
        if gradients:
            found[name] = whole(nn.utils.get_total_norm(gradients)).item()
    return found
