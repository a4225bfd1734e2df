"""One optimizer step: the loss summed over all supervised tokens of the global batch, divided by their number."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

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
    groups: dict[str, list[nn.Parameter]] = {"muon": [], "decay": [], "plain": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim >= 2 and not any(part in name for part in ("embed", "token", "lm_head", "vit_eos"))
        hidden = matrix and parameter.ndim == 2 and settings.optimizer == "muon"
        groups["muon" if hidden else "decay" if matrix else "plain"].append(parameter)
    decayed = {"params": groups["decay"], "weight_decay": settings.weight_decay}
    plain = {"params": groups["plain"], "weight_decay": 0.0}
    kept = [group for group in (decayed, plain) if group["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if kept:
        rates = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.epsilon}
        optimizers.append(torch.optim.AdamW(kept, **rates))  # type: ignore[arg-type]
    if groups["muon"]:
        chosen = {"lr": settings.muon_rate, "momentum": settings.muon_momentum, "weight_decay": settings.weight_decay}
        optimizers.append(torch.optim.Muon(groups["muon"], **chosen))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


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
) -> dict[str, float]:
    """Forward and backward over this rank's micro-batches, and one move of the optimizers at ``rate`` times their peak.
    Returns the global loss, the gradient's norm, how many tokens were supervised, and how many samples were not at all.
    Raises NonFinite, naming this rank's samples, before the optimizers move."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    device = next(model.parameters()).device
    counts = torch.tensor([[batch.supervised, batch.unsupervised] for batch in batches], dtype=torch.float32).sum(dim=0)
    if world > 1:
        dist.all_reduce(counts)
    tokens, unsupervised = counts
    total = torch.zeros((), device=device)
    for batch in batches:
        inputs = {name: value.to(device, non_blocking=True) for name, value in batch.inputs.items()}
        last = batch is batches[-1]
        with gradients_shared(model, last), torch.autocast(device.type, precision, precision != torch.float32):
            # Data parallelism averages gradients over ranks: times the world over the global count is the global mean.
            loss = model(**inputs, num_items_in_batch=tokens.clamp(min=1).to(device) / world).loss
        with gradients_shared(model, last):
            loss.backward()
        total += loss.detach() / world
    weights = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(weights, settings.clip)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if world > 1:
        dist.all_reduce(total)
    if not (torch.isfinite(total) and torch.isfinite(norm)):
        keys = ", ".join(key for batch in batches for key in batch.keys)
        raise NonFinite(f"loss {total.item()}, gradient norm {norm.item()}; this rank held {keys}")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {
        "loss": total.item(),
        "gradient_norm": norm.item(),
        "tokens": tokens.item(),
        "unsupervised": unsupervised.item(),
    }
