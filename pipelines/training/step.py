"""One optimizer step: the loss summed over all supervised tokens of the global batch, divided by their number."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn

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


class NonFinite(OwlError):
    """The loss or the gradient is not a number; the optimizer has not moved."""


def train_step(
    model: nn.Module,
    batch: Batch,
    optimizers: list[torch.optim.Optimizer],
    settings: Optimization,
    rate: float,
) -> dict[str, float]:
    """Forward, backward and one move of the optimizers at ``rate`` times their peak. Returns the global loss, the
    gradient's norm, how many tokens were supervised, and how many samples were not at all. Raises NonFinite, naming
    this rank's samples, before the optimizers move."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    counts = torch.tensor([float(batch.supervised), float(batch.unsupervised)])
    if world > 1:
        dist.all_reduce(counts)
    tokens, unsupervised = counts
    # Data parallelism averages gradients over ranks: times the world, over the global count, gives the global mean.
    loss = model(**batch.inputs, num_items_in_batch=tokens.clamp(min=1) / world).loss
    loss.backward()
    weights = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(weights, settings.clip)
    total = loss.detach() / world
    if world > 1:
        dist.all_reduce(total)
    if not (torch.isfinite(total) and torch.isfinite(norm)):
        raise NonFinite(f"loss {total.item()}, gradient norm {norm.item()}; this rank held {', '.join(batch.keys)}")
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
