"""How much memory a model takes, before it exists: everything is built and run on PyTorch's meta device.

Weights, gradients and optimizer states are counted; what the backward pass needs is counted too, as the tensors that
autograd would keep (gradient checkpointing included), by running each part forward without computing anything.
Attention is counted as the fused kernels of SDPA keep it, which the meta device does not know of itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from owl_model.adaptive import Rows
from owl_model.modeling import LOSS_ROWS, OwlForConditionalGeneration


def predict_training(
    owl: OwlForConditionalGeneration, model: nn.Module, *, batch: int, length: int, pictures: int
) -> dict[str, int]:
    """Bytes of one training step by part, for ``batch`` samples of ``length`` tokens that show ``pictures`` pictures
    each. ``owl`` is on the meta device, with attention ATTENTION and its ``requires_grad`` set; ``model`` is it, or
    what peft wraps around it. AdamW keeps two numbers for each that trains, in its type. The workspace is what the
    head's loss takes besides: three tensors of fp32 logits."""
    weights = sizes(model.parameters()) + sizes(model.buffers())
    trainable = sizes(p for p in model.parameters() if p.requires_grad)
    kept = Kept(model)
    with kept:
        run(owl, batch, length, pictures)
    parts = {
        "weights": weights,
        "gradients": trainable,
        "optimizer": 2 * trainable,
        "activations": kept.bytes,
        "workspace": 3 * 4 * owl.config.text_config.vocab_size * min(LOSS_ROWS, batch * length),
    }
    return {**parts, "total": sum(parts.values())}


def predict_inference(owl: OwlForConditionalGeneration, *, batch: int, length: int) -> dict[str, int]:
    """Bytes of weights and of the keys and values of ``batch`` conversations of ``length`` tokens."""
    text = owl.config.text_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    weights = sizes(owl.parameters()) + sizes(owl.buffers())
    cache = 2 * text.num_hidden_layers * heads * width * batch * length * owl.dtype.itemsize
    return {"weights": weights, "cache": cache, "total": weights + cache}


def sizes(tensors) -> int:
    unique = {id(tensor): tensor for tensor in tensors}.values()
    return sum(tensor.numel() * tensor.element_size() for tensor in unique)


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of the storages that autograd saves, each once, weights left out."""

    def __init__(self, model: nn.Module):
        self.bytes = 0
        self.seen: dict[int, Any] = {p.untyped_storage()._cdata: p for p in model.parameters()}
        super().__init__(self.count, lambda tensor: tensor)

    def count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage  # held, so that its address is not given away again
            self.bytes += storage.nbytes()
        return tensor.detach()  # the tensor itself would hold its own graph


def run(owl: OwlForConditionalGeneration, batch: int, length: int, pictures: int) -> None:
    """The forward pass, part by part: placing pictures depends on values, which the meta device has not."""
    model, config = owl.model, owl.config
    numbers = {"device": owl.device, "dtype": owl.dtype}
    places = {"device": owl.device, "dtype": torch.long}
    embeds = model.get_input_embeddings()(torch.zeros(batch, length, **places))
    width, side = embeds.shape[-1], config.vision_config.image_size
    visual = pictures * config.visual_tokens
    if visual:
        tokens = model.abstractor(model.get_vision_features(torch.empty(batch * pictures, 3, side, side, **numbers)))
        words = torch.empty(batch, length - visual, width, **numbers)
        embeds = torch.cat([tokens.view(batch, visual, width), words], dim=1)
    extra = {}
    if config.modality_adaptive and visual:
        counts = (batch * (length - visual), batch * visual, batch * length)
        extra["rows"] = Rows(*[torch.empty(count, **places) for count in counts])
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool, device=owl.device)  # as of a batch with padding
    given = {"inputs_embeds": embeds, "attention_mask": mask, "use_cache": False}
    hidden = model.language_model(**given, **extra).last_hidden_state
    rows = hidden.flatten(0, 1)[: batch * (length - visual)]
    owl.token_losses(rows, torch.zeros(len(rows), **places)).sum()


class FusedAttention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: query, key, value, output and one number a row. Computes nothing."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty(*query.shape[:-1], value.shape[-1], device=query.device, dtype=query.dtype)
        rows = torch.empty(query.shape[:-1], device=query.device, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, rows)
        return out

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError("only memory is counted here")


def attend(module, query, key, value, attention_mask, **kwargs):
    """[N, heads, L, d] → [N, L, heads, d], as the other entries of transformers' attention interface."""
    return FusedAttention.apply(query, key, value).transpose(1, 2), None


ATTENTION = "owl_memory"
AttentionInterface.register(ATTENTION, attend)
