"""What people try first with a transformers model: compile, peft, Trainer, accelerate, device maps."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator
from conversations import CONVERSATIONS, shown
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from owl_model.adaptive import sort_rows
from owl_model.answering import prompt_inputs


def batch(pair, which=(0, 1, 3)) -> dict[str, torch.Tensor]:
    """A mixed batch with labels, padded left; nothing but what is visual is unsupervised."""
    owl, processor = pair
    pictures = shown()
    inputs = prompt_inputs(processor, [CONVERSATIONS[i][0] for i in which], [pictures[i] for i in which])
    visual = inputs["input_ids"] >= owl.config.image_token_id
    return {**inputs, "labels": inputs["input_ids"].masked_fill(visual, -100)}


def test_the_hot_path_compiles_without_graph_breaks(pair):
    owl, _ = pair
    inputs = batch(pair)
    model = owl.model
    images = torch.compile(model.vision_model, fullgraph=True, backend="aot_eager")
    read = torch.compile(model.abstractor, fullgraph=True, backend="aot_eager")
    decode = torch.compile(model.language_model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        features = images(inputs["pixel_values"]).last_hidden_state
        tokens = read(features)
        torch.testing.assert_close(tokens, model.get_image_features(inputs["pixel_values"]).pooler_output)
    visual = inputs["input_ids"] == owl.config.image_token_id
    embeds = model.get_input_embeddings()(inputs["input_ids"].masked_fill(visual, 0))
    rows = {"rows": sort_rows(visual)} if owl.config.modality_adaptive else {}
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "use_cache": False, **rows}
    compiled, plain = decode(**given).last_hidden_state, model.language_model(**given).last_hidden_state
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-4)
    compiled.sum().backward()


def test_peft_adapts_every_linear_of_the_decoder(pair):
    owl, _ = pair
    names = [name for name, module in owl.named_modules() if isinstance(module, nn.Linear) and "language_model" in name]
    adapted = get_peft_model(owl, LoraConfig(r=4, lora_alpha=8, target_modules=names))
    inputs = batch(pair)
    adapted.train()
    adapted(**inputs).loss.backward()
    ups = {name: p for name, p in adapted.named_parameters() if "lora_B" in name}
    assert len(ups) == len(names)
    assert all(p.grad is not None and p.grad.any() for p in ups.values())
    with torch.no_grad():
        for parameter in ups.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        wanted = adapted.eval()(**inputs).loss
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).loss, wanted)


def test_transformers_trainer_learns_in_twenty_steps(pair, tmp_path):
    owl, _ = pair
    inputs = batch(pair)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        learning_rate=3e-3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        save_steps=10,
    )
    trainer = Trainer(owl, arguments, train_dataset=[inputs] * 40, data_collator=lambda samples: samples[0])
    with torch.no_grad():
        before = owl.eval()(**inputs).loss.item()
    trainer.train()
    with torch.no_grad():
        after = owl.eval()(**inputs).loss.item()
    assert after < 0.5 * before
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-20").eval()
    with torch.no_grad():
        assert saved(**inputs).loss.item() == pytest.approx(after, rel=1e-5)
    history = json.loads((tmp_path / "checkpoint-20" / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in history if "loss" in entry]) == 20


def test_accelerate_prepares_and_steps(pair):
    owl, _ = pair
    inputs = batch(pair)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(owl.train(), torch.optim.AdamW(owl.parameters(), lr=3e-3))
    losses = []
    for _ in range(20):
        with accelerator.accumulate(model):
            loss = model(**inputs).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_auto_classes_open_a_folder(pair, tmp_path):
    owl, processor = pair
    owl.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map="cpu")
    read = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(owl)
    assert read.template == processor.template
    messages = CONVERSATIONS[5][0]
    assert read.encode(messages, prompt=True) == processor.encode(messages, prompt=True)
