"""Does a model folder compute what the authors' code computed? Reads case folders of reference outputs:

    config.json, model.safetensors   the authors' folder
    io.safetensors                   inputs ("in.…") and outputs ("out.…")
    meta.json                        loss, gradient norms, losses of four AdamW steps, greedy tokens

Everything runs in fp32 on the CPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from owl_model import conversion
from owl_model.modeling import OwlForConditionalGeneration

Tensors = dict[str, torch.Tensor]

TOLERANCES = {
    "vision": 1e-4,
    "abstractor": 1e-4,
    "logits": 1e-4,
    "loss": 1e-5,
    "gradient_groups": 1e-4,
    "gradients": 1e-3,
    "adamw": 2e-3,
}
"""Largest errors: absolute for outputs and losses, relative for gradient norms (of groups, of each parameter)."""


def check(folder: str | Path) -> dict[str, Any]:
    """One case: {"case", "errors": {name: error}, "greedy": whether the tokens agree, "passed"}."""
    folder = Path(folder)
    meta = json.loads((folder / "meta.json").read_text())
    tensors = load_file(folder / "io.safetensors")
    owl = OwlForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    inputs, labels, valid = inputs_of(owl, tensors)
    errors: dict[str, float] = {}
    with torch.no_grad():
        for kind, features in features_of(owl, tensors):
            for name, value in (("vision", features.last_hidden_state), ("abstractor", features.pooler_output)):
                wanted = tensors[f"out.{'vision_last_hidden_state' if name == 'vision' else name}.{kind}"]
                errors[name] = max(errors.get(name, 0.0), distance(value, wanted))
        logits = owl(**inputs).logits
        errors["logits"] = distance(logits[valid], tensors["out.logits"][valid])
    agree = greedy(owl, tensors, inputs) == meta["greedy_tokens"]
    errors |= training_errors(owl, inputs, labels, meta)
    passed = agree and all(error <= TOLERANCES[name] for name, error in errors.items())
    return {"case": folder.name, "errors": errors, "greedy": agree, "passed": passed}


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    theirs = theirs.view_as(ours)  # the video code keeps an axis for a picture's single frame
    return (ours.float() - theirs.float()).abs().max().item()


def inputs_of(owl: OwlForConditionalGeneration, tensors: Tensors) -> tuple[Tensors, torch.Tensor, torch.Tensor]:
    """The case as our model takes it: inputs, labels [B, L], and which rows [B, L] count."""
    ids = tensors["in.input_ids"]
    if "in.valid_mask_after_merge" in tensors:  # Owl2: one placeholder a picture, made into all of its tokens here
        valid = tensors["in.valid_mask_after_merge"].bool()
        rows = [expanded(owl, row[mask.bool()]) for row, mask in zip(ids, tensors["in.attention_mask"], strict=True)]
        ids = torch.zeros(valid.shape, dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
        labels = tensors["out.labels_after_merge"]
    else:
        valid = tensors["in.valid_mask"].bool()
        ids, labels = with_our_ids(owl, ids), tensors["out.labels"]
    inputs = {"input_ids": ids, "attention_mask": valid.long()}
    pictures = int((ids == owl.config.image_token_id).sum()) // owl.config.visual_tokens
    if pictures:
        inputs["pixel_values"] = needed(tensors, pictures)
    if "in.video_pixel_values" in tensors:
        inputs["pixel_values_videos"] = tensors["in.video_pixel_values"].transpose(1, 2)  # [M, 3, T, H, W] there
    return inputs, labels, valid


def with_our_ids(owl: OwlForConditionalGeneration, ids: torch.Tensor) -> torch.Tensor:
    """mPLUG-Owl's placeholders: -1 for pictures, -2 for videos."""
    ids = ids.masked_fill(ids == -1, owl.config.image_token_id)
    return ids.masked_fill(ids == -2, owl.config.video_token_id)


def expanded(owl: OwlForConditionalGeneration, ids: torch.Tensor) -> torch.Tensor:
    """mPLUG-Owl2's single placeholder -200 → one for each visual token."""
    each = torch.where(ids == -200, owl.config.visual_tokens, 1)
    return ids.masked_fill(ids == -200, owl.config.image_token_id).repeat_interleave(each)


def needed(tensors: Tensors, pictures: int) -> torch.Tensor:
    """Pixels without the zero pictures that Owl2's original wants for samples of text alone."""
    pixels = tensors["in.pixel_values"]
    if len(pixels) == pictures:
        return pixels
    slots, shown = tensors["in.image_slots_per_sample"].tolist(), tensors["in.images_per_sample"].tolist()
    keep = [index < has for slot, has in zip(slots, shown, strict=True) for index in range(slot)]
    return pixels[torch.tensor(keep)]


def features_of(owl: OwlForConditionalGeneration, tensors: Tensors):
    """Of all pictures given, also those that no text shows."""
    if "out.abstractor.image" in tensors:
        yield "image", owl.get_image_features(tensors["in.pixel_values"])
    if "out.abstractor.video" in tensors:
        yield "video", owl.get_video_features(tensors["in.video_pixel_values"].transpose(1, 2))


def greedy(owl: OwlForConditionalGeneration, tensors: Tensors, inputs: Tensors) -> list[list[int]]:
    """The tokens that follow each sample's prompt, all samples in one left-padded batch."""
    rows = 0
    while f"in.prompt_ids.{rows}" in tensors:
        rows += 1
    prompts = [tensors[f"in.prompt_ids.{row}"] for row in range(rows)]
    owl2 = owl.config.modality_adaptive
    prompts = [expanded(owl, ids) if owl2 else with_our_ids(owl, ids) for ids in prompts]
    length = max(len(ids) for ids in prompts)
    padded = torch.stack([torch.nn.functional.pad(ids, (length - len(ids), 0)) for ids in prompts])
    mask = torch.stack([(torch.arange(length) >= length - len(ids)).long() for ids in prompts])
    pictures = {name: value for name, value in inputs.items() if name.startswith("pixel_values")}
    new = tensors["out.greedy_tokens"].shape[1]
    options = GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    tokens = owl.generate(input_ids=padded, attention_mask=mask, **pictures, generation_config=options)
    return tokens[:, length:].tolist()


def training_errors(owl: OwlForConditionalGeneration, inputs: Tensors, labels: torch.Tensor, meta: dict) -> dict:
    """Loss, gradient norms, and the losses of AdamW steps. Leaves ``owl`` trained."""
    owl(**inputs, labels=labels).loss.backward()
    back = {id(value): name for name, value in conversion.official_state(owl).items()}
    norms = {back[id(p)]: 0.0 if p.grad is None else p.grad.norm().item() for p in owl.parameters()}
    wanted = {name: norm or 0.0 for name, norm in meta["grad_norm_per_parameter"].items()}  # null: never touched
    largest = max(wanted.values())
    groups: dict[str, list[float]] = {}
    for name, norm in norms.items():
        groups.setdefault(group_of(name), []).append(norm)
    by_group = {name: torch.tensor(values).norm().item() for name, values in groups.items()}
    losses = []
    optimizer = torch.optim.AdamW(owl.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for _ in meta["adamw_losses"]:
        optimizer.zero_grad()
        loss = owl(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {
        "loss": abs(losses[0] - meta["loss"]),
        # A norm that is zero but for rounding (a key's bias) is held to the largest one's scale.
        "gradients": max(abs(norms[name] - norm) / max(norm, 1e-4 * largest) for name, norm in wanted.items()),
        "gradient_groups": max(
            abs(by_group[name] - meta["grad_norm"][name]) / max(meta["grad_norm"][name], 1e-4 * largest)
            for name in by_group
        ),
        "adamw": max(abs(ours - theirs) for ours, theirs in zip(losses, meta["adamw_losses"], strict=True)),
    }


def group_of(name: str) -> str:
    if "vision_model" in name:
        return "vision"
    return "abstractor" if "abstractor" in name or "query_tokens" in name else "language"
