"""The one table of what trains in each stage, the settings of a stage, and the one function that obeys them.

stage        vision   abstractor   language model   pictures
language     –        –            trains           no        a stand-in for the foundation LLM that users bring
stage1       trains   trains       frozen           yes       mPLUG-Owl section 3.2, stage 1
stage2       frozen   trains       LoRA             yes       mPLUG-Owl section 3.2, stage 2
owl2_stage1  trains   trains       its visual side  yes       mPLUG-Owl2 section 3.3, stage 1
owl2_stage2  trains   trains       trains           yes       mPLUG-Owl2 section 3.3, stage 2
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from pipelines.settings import OwlError, Settings

if TYPE_CHECKING:  # settings need not wait for torch
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from owl_model import OwlForConditionalGeneration

How = Literal["trains", "frozen", "lora", "visual"]
"""visual: of the modality-adaptive module the copies for visual tokens, which are new."""


@dataclass(frozen=True)
class Trains:
    vision: How
    abstractor: How
    language: How
    pictures: bool = True
    """Whether this stage looks at pictures at all."""


STAGES = {
    "language": Trains(vision="frozen", abstractor="frozen", language="trains", pictures=False),
    "stage1": Trains(vision="trains", abstractor="trains", language="frozen"),
    "stage2": Trains(vision="frozen", abstractor="trains", language="lora"),
    "owl2_stage1": Trains(vision="trains", abstractor="trains", language="visual"),
    "owl2_stage2": Trains(vision="trains", abstractor="trains", language="trains"),
}


class Lora(Settings):
    """Low-rank adaptation of the language model (stage 2)."""

    rank: int = 8
    """Rank of the update."""
    alpha: int = 32
    """Scale: the update is multiplied by alpha / rank."""
    dropout: float = 0.05
    """Dropout on the update's input."""
    targets: list[str] = ["q_proj", "v_proj"]
    """Linear modules of the language model that are adapted."""


class Optimization(Settings):
    """Optimizer and schedule. Defaults are the paper's (arXiv 2304.14178, section 4.1)."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW as in the paper; or Muon for the weight matrices and AdamW for all else, which needs fewer steps."""
    learning_rate: float = 1e-4
    """Peak rate of AdamW."""
    muon_rate: float = 0.02
    """Peak rate of Muon, where it is used."""
    muon_momentum: float = 0.95
    """Momentum of Muon."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's averages."""
    epsilon: float = 1e-6
    """AdamW's denominator floor."""
    weight_decay: float = 0.1
    """Decay of weight matrices; norms, biases and embeddings do not decay."""
    layer_decay: float = 1.0
    """Each layer of the vision encoder learns at this times the rate of the one above it (mPLUG-Owl2: 0.9)."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    warmup: int = 2000
    """Steps of linear warm-up; a cosine to zero follows."""


class Stage(Settings):
    """One stage of training."""

    data: list[str] = []
    """Folders of curated datasets."""
    weights: list[float] = []
    """Each dataset's share of what is seen, in any unit; empty goes through all of them together, each sample once an
    epoch."""
    start: str = ""
    """Model folder to begin from."""
    image_size: int = 0
    """Side of the pictures in px, where it is not the starting model's; 0 keeps that."""
    steps: int = 50_000
    """Optimizer steps."""
    batch_size: int = 256
    """Samples in a global batch, over all workers."""
    micro_batch: int = 0
    """Rows that a worker computes at once; gradients of the rest of its share are added. 0 takes all at once."""
    pack_tokens: int = 0
    """Tokens that a row holds of as many samples as fit, each seen by itself; 0 gives each sample a row."""
    max_tokens: int = 2048
    """Longest sample; what is longer is cut, and counted."""
    crop: float = 1.0
    """Least share of a picture's area that is shown, cropped at random; 1 shows all of it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What matrices are multiplied in, and frozen weights are held in; weights that train, and the optimizer, stay in
    fp32."""
    checkpoint_activations: bool = False
    """Whether activations inside layers are computed anew in the backward pass, which saves their memory."""
    compile_layers: bool = False
    """Whether layers are compiled (torch.compile), one by one."""
    sharding: Literal["none", "weights"] = "none"
    """Whether every worker holds all weights (DDP), or each a part (FSDP2)."""
    optimization: Optimization = Optimization()
    """Optimizer and schedule."""
    lora: Lora = Lora()
    """Low-rank adaptation, where the stage uses it."""
    freeze_vision: bool = False
    """Keeps the vision encoder frozen also in a stage that would train it: for pretrained towers and little data."""
    freeze_abstractor: bool = False
    """Keeps the abstractor frozen, as mPLUG-Owl's released code does in stage 2 and its paper does not."""
    workers: int = 1
    """Training workers; each takes the resources below."""
    min_workers: int = 0
    """Workers with which the run also goes on when there is no room for all, and grows again when there is; 0 waits for
    all."""
    cpus_per_worker: float = 1
    """CPUs of a worker."""
    gpus_per_worker: float = 0
    """GPUs of a worker."""
    max_failures: int = 3
    """How often the run starts again from its last checkpoint when a worker dies."""
    log_every: int = 10
    """Steps between logged losses."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]
    """Where numbers go besides the run's log and Ray's metrics; the last two need their package."""
    log_keys: bool = False
    """Whether the keys of every step's samples are written down, in RUN/keys."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    checkpoint_beside: bool = True
    """Whether checkpoints are written while training goes on."""
    keep_checkpoints: int = 2
    """How many checkpoints stay."""
    keep_by: str = ""
    """The metric of whose smallest values the checkpoints stay, beside the last: loss or validation_loss. Empty keeps
    the last ones."""
    keep_megabytes: int = 1024
    """Memory of a worker for prepared pictures (or features, where vision is frozen), each once however many samples
    show it; what does not fit is prepared anew."""
    cache_gigabytes: float = 20
    """Disk of a machine for shards that come from elsewhere."""
    validation: list[str] = []
    """Folders of curated datasets on which the loss is measured, beside the training workers."""
    validate_every: int = 0
    """Steps between such measurements, a multiple of checkpoint_every; 0 makes none."""
    validation_samples: int = 200
    """How many of their samples are looked at."""
    seed: int = 0
    """Of the order of samples and of fresh weights."""

    @model_validator(mode="after")
    def settings_go_together(self) -> Stage:
        if self.weights and (len(self.weights) != len(self.data) or min(self.weights) <= 0):
            raise ValueError(
                f"weights {self.weights} must be one positive number for each of {len(self.data)} datasets"
            )
        if self.validate_every % self.checkpoint_every or (self.validate_every > 0) != bool(self.validation):
            raise ValueError(
                f"validate_every {self.validate_every} must be a multiple of checkpoint_every {self.checkpoint_every}, "
                f"and goes with validation {self.validation}"
            )
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop {self.crop} must be a share above 0, up to 1")
        if self.pack_tokens and self.pack_tokens < self.max_tokens:
            raise ValueError(
                f"pack_tokens {self.pack_tokens} must hold the longest sample: max_tokens {self.max_tokens}"
            )
        if self.sharding == "weights" and self.optimization.optimizer == "muon":
            raise ValueError("optimization.optimizer muon needs whole matrices, which sharding weights takes apart")
        return self

    def trains(self, stage: str) -> Trains:
        table = STAGES[stage]
        return replace(
            table,
            vision="frozen" if self.freeze_vision else table.vision,
            abstractor="frozen" if self.freeze_abstractor else table.abstractor,
        )


def parts_of(owl: OwlForConditionalGeneration) -> dict[str, list[nn.Module]]:
    model = owl.model
    return {
        "vision": [model.vision_model],
        "abstractor": [model.abstractor],
        "language": [model.language_model, owl.lm_head],
    }


def prepare(owl: OwlForConditionalGeneration, trains: Trains, lora: Lora) -> nn.Module:
    """Freezes and unfreezes as the table says; with LoRA, returns the model that peft wraps around ``owl``.

    Frozen parts are put in evaluation mode by `train_mode`, so that their dropout and batch statistics rest too.
    """
    from peft import LoraConfig, get_peft_model
    from torch import nn

    owl.requires_grad_(False)
    model: nn.Module = owl
    if trains.language == "lora":
        targets = [  # of the modality-adaptive module, both copies
            name
            for name, module in owl.named_modules()
            if isinstance(module, nn.Linear) and "language_model" in name and set(name.split(".")) & set(lora.targets)
        ]
        if not targets:
            raise OwlError(f"no linear module of the language model is called {' or '.join(lora.targets)}")
        settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
        with warnings.catch_warnings():  # peft asks transformers by a name that the latter is about to change
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            model = get_peft_model(owl, settings)  # type: ignore[arg-type]
    for name, modules in parts_of(owl).items():
        if getattr(trains, name) == "trains":
            for module in modules:
                module.requires_grad_(True)
    if trains.language == "visual":
        visual = [p for name, p in owl.model.language_model.named_parameters() if ".multiway.1." in name]
        if not visual:
            raise OwlError("this stage trains the visual side of the modality-adaptive module, which the model lacks")
        for parameter in visual:
            parameter.requires_grad_(True)
    return model


def checkpoint_activations(module: PreTrainedModel) -> None:
    """transformers 5.23 gave it another name."""
    getattr(module, "activation_checkpointing_enable", module.gradient_checkpointing_enable)()


def train_mode(owl: OwlForConditionalGeneration, trains: Trains) -> None:
    """Frozen parts rest, but for the layers' own flag, by which they compute their activations anew where asked to."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    owl.train()
    for name, modules in parts_of(owl).items():
        if getattr(trains, name) == "frozen":
            for module in modules:
                module.eval()
                for layer in module.modules():
                    if isinstance(layer, GradientCheckpointingLayer):
                        layer.training = True


def freeze_in(owl: OwlForConditionalGeneration, dtype: torch.dtype) -> None:
    """Frozen weights in another type: nothing is ever added to them."""
    for parameter in owl.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def count_parameters(owl: OwlForConditionalGeneration) -> dict[str, dict[str, int]]:
    """{"vision": {"trainable": n, "total": m}, …}; tied weights count once."""
    table = {}
    seen: set[int] = set()
    for name, modules in parts_of(owl).items():
        weights = [p for module in modules for p in module.parameters() if id(p) not in seen]
        weights = list({id(p): p for p in weights}.values())
        seen |= {id(p) for p in weights}
        trainable = sum(p.numel() for p in weights if p.requires_grad)
        table[name] = {"trainable": trainable, "total": sum(p.numel() for p in weights)}
    return table
