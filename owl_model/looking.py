"""Where in its pictures an answer looked: the decoder's attention to visual tokens, times theirs to the picture.

    answer tokens → [Q] a picture's queries → [Q, P] its patches → [rows, columns], summing to 1

Both are means over heads and layers: they show where information came from, not that it was used (Jain & Wallace 2019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from owl_model.abstractor import OwlAbstractor
from owl_model.modeling import OwlForConditionalGeneration


class Watch:
    """Sees a decoder's attention layer after layer, and keeps how much the rows from ``first`` on give each place."""

    def __init__(self, first: int):
        self.first, self.layers = first, 0
        self.given: torch.Tensor | float = 0.0

    def see(self, query: torch.Tensor, key: torch.Tensor, scaling: float | None) -> None:
        """[1, heads, L, d], [1, key heads, L, d]"""
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).float()
        scores = query[:, :, self.first :].float() @ key.transpose(-1, -2)
        scores *= query.shape[-1] ** -0.5 if scaling is None else scaling
        length = key.shape[2]
        later = torch.ones(length, length, dtype=torch.bool, device=key.device).triu(1)[self.first :]
        self.given = self.given + scores.masked_fill(later, -torch.inf).softmax(-1).mean(dim=(0, 1, 2))
        self.layers += 1


@torch.no_grad()
def patches_of_queries(abstractor: OwlAbstractor, features: torch.Tensor) -> torch.Tensor:
    """features [1, P, Dv] → [Q, P]: how much each query takes of each patch, over heads and layers."""
    features = abstractor.feature_proj(features.to(abstractor.query_tokens.dtype))
    queries, taken = abstractor.query_tokens, torch.zeros(())
    count = queries.shape[1]
    for layer in abstractor.encoder.layers:
        part = layer.crossattention
        normed = part.norm1(queries)
        weights = part.attention.weights(normed, torch.cat([normed, part.normk(features)], dim=1))
        taken = taken.to(weights.device) + weights[0, :, :, count:].float().mean(dim=0)
        queries = layer(queries, features)
    return taken / taken.sum(-1, keepdim=True)


@torch.no_grad()
def looked(
    owl: OwlForConditionalGeneration, prompt: Sequence[int], answer: Sequence[int], pixels: torch.Tensor
) -> list[torch.Tensor]:
    """For each of the pictures [N, 3, S, S] that stand in the prompt, [rows, columns]. The decoder's attention must
    hand its queries and keys to the ``watch`` that it is called with. Raises ValueError where patches make no
    square."""
    features = owl.model.get_vision_features(pixels.to(owl.device))
    patches = features.shape[1]
    side = math.isqrt(patches)
    first = patches - side * side  # 1 where a class token stands before the patches
    if first > 1:
        raise ValueError(f"{patches} patches make no square")
    ids = torch.tensor([[*prompt, *answer]], device=owl.device)
    watch = Watch(len(prompt) - 1)
    owl.model(input_ids=ids[:, :-1], vision_features=features, use_cache=False, watch=watch)
    if not watch.layers:
        raise ValueError("this decoder's attention cannot be watched")
    given = torch.as_tensor(watch.given)
    shown = (ids[0, :-1] == owl.config.image_token_id).nonzero()[:, 0].view(len(features), -1)
    maps = []
    for place, one in zip(shown, features, strict=True):
        weights = patches_of_queries(owl.model.abstractor, one[None])
        over = given[place][: len(weights)] @ weights
        grid = over[first:].view(side, side)
        maps.append((grid / grid.sum()).cpu())
    return maps
