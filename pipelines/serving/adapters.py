"""LoRA adapters beside the weights, for requests of several adapters in one batch.

    y = W x + scale · B A x        for the rows of the requests that asked for it (Hu et al. 2021, section 4.1)

Adapters are PEFT's folders, of the language model alone: one that changes how pictures are read would need embeddings
of its own.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from owl_model import OwlForConditionalGeneration
from owl_model.adaptive import Rows as Split
from pipelines.serving.engine import Unfit
from pipelines.serving.models import digest

PREFIX = "base_model.model."


class Pair(NamedTuple):
    down: torch.Tensor
    """[r, in]"""
    up: torch.Tensor
    """[out, r], times the scale"""


Rows = Sequence[tuple[str, slice]]
"""Which adapter, and which rows of the step are its requests'."""


class Adapters:
    """Those that were asked for last, up to a number."""

    def __init__(self, owl: OwlForConditionalGeneration, most: int = 8):
        self.owl, self.most = owl, most
        self.held: OrderedDict[str, dict[str, Pair]] = OrderedDict()
        self.hooked: set[str] = set()
        self.now = threading.local()  # a step's rows, of the thread that computes it
        self.lock = threading.Lock()

    def load(self, name: str, used: Collection[str] = ()) -> None:
        """``name`` is FOLDER@DIGEST; none of ``used`` is given up for it. Raises Unfit where the folder holds something
        else, or no adapter that fits."""
        with self.lock:
            if name in self.held:
                self.held.move_to_end(name)
                return
            folder, _, wanted = name.rpartition("@")
            if digest(folder) != wanted:
                raise Unfit("the adapter has changed; ask again")
            pairs = self.read(folder)
            for module in pairs.keys() - self.hooked:
                self.owl.get_submodule(module).register_forward_hook(self.hook(module))
                self.hooked.add(module)
            self.held[name] = pairs
            idle = [other for other in self.held if other != name and other not in used]
            for other in idle[: max(0, len(self.held) - self.most)]:
                del self.held[other]

    def read(self, folder: str) -> dict[str, Pair]:
        config = LoraConfig.from_pretrained(folder)
        odd = [
            name for name in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern") if getattr(config, name)
        ]
        if odd or config.bias != "none":
            raise Unfit(f"the adapter needs {odd[0] if odd else 'bias'}, which this engine does not have")
        scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        weights = load_file(f"{folder}/adapter_model.safetensors")
        like = self.owl.get_input_embeddings().weight
        pairs = {}
        for name, down in weights.items():
            if not name.endswith(".lora_A.weight"):
                continue
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            up = weights[name.replace("lora_A", "lora_B")] * scale
            if "language_model" not in module or not isinstance(self.module(module), nn.Linear):
                raise Unfit("the adapter changes more than linear layers of the language model")
            pairs[module] = Pair(down.to(like), up.to(like))
        if 2 * len(pairs) != len(weights):
            raise Unfit("the adapter holds more than pairs of LoRA matrices")
        return pairs

    def module(self, name: str) -> nn.Module | None:
        try:
            return self.owl.get_submodule(name)
        except AttributeError:
            return None

    def hook(self, module: str) -> Any:
        def add(layer: nn.Module, inputs: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor | None:
            rows = getattr(self.now, "rows", ())
            if not rows:
                return None
            out = out.clone()
            for name, some in rows:
                pair = self.held[name].get(module)
                if pair is not None:
                    some = self.among(module, some)
                    out[..., some, :] += inputs[0][..., some, :] @ pair.down.T @ pair.up.T
            return out

        return add

    def among(self, module: str, some: slice) -> slice:
        """Rows of a step, among those that a copy of a doubled part is given: words alone, or visual tokens."""
        copy = module.rpartition(".multiway.")[2]
        if self.now.split is None or copy not in ("0", "1"):
            return some
        given = self.now.split.text if copy == "0" else self.now.split.image
        first, end = torch.searchsorted(given, given.new_tensor([some.start, some.stop])).tolist()
        return slice(first, end)

    @contextmanager
    def used(self, rows: Rows, split: Split | None) -> Iterator[None]:
        """Within it, this thread's steps add the adapters to these rows. ``split`` is how an adaptive model shares its
        rows out."""
        self.now.rows, self.now.split = rows, split
        try:
            yield
        finally:
            self.now.rows = ()
