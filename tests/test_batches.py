"""Right where batches make it easy to be wrong: each of these fails on the original's behaviour."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import transformers
from conversations import CONVERSATIONS, ask, picture, shown
from packaging.version import Version
from transformers import GenerationConfig

from owl_model.answering import answer, generation_config, prompt_inputs
from pipelines.training.stages import checkpoint_activations


@pytest.mark.parametrize("use_cache", [True, False])
def test_eight_conversations_are_answered_as_one_by_one(pair, use_cache):
    owl, processor = pair
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "use_cache": use_cache}
    pictures = shown()

    def tokens(which: list[int]) -> list[list[int]]:
        inputs = prompt_inputs(processor, [CONVERSATIONS[i][0] for i in which], [pictures[i] for i in which])
        config = generation_config(owl, processor, **options)
        made = owl.generate(**inputs, generation_config=config)
        return made[:, inputs["input_ids"].shape[1] :].tolist()

    together = tokens(list(range(8)))
    assert together == [tokens([i])[0] for i in range(8)]
    assert len({tuple(row) for row in together}) > 4


def test_forward_and_loss_of_a_batch_equal_one_by_one(pair):
    owl, processor = pair
    conversations = [[*messages, {"role": "assistant", "content": "two three"}] for messages, _ in CONVERSATIONS]
    encoded = [processor.encode(messages) for messages in conversations]
    pixels = [[processor.image_processor.pixels(data) for data in given] for given in shown()]

    def run(which: list[int]):
        inputs = processor.collate([encoded[i] for i in which])
        flat = [each for i in which for each in pixels[i]]
        inputs["pixel_values"] = torch.stack(flat) if flat else None
        labels = inputs.pop("labels")
        with torch.no_grad():
            loss = owl(**inputs, labels=labels, num_items_in_batch=1).loss
            return owl(**inputs).logits, loss

    logits, loss = run(list(range(8)))
    alone = [run([i]) for i in range(8)]
    torch.testing.assert_close(loss, sum(single for _, single in alone), atol=1e-3, rtol=1e-5)
    for row, (single, _) in enumerate(alone):
        torch.testing.assert_close(logits[row, : single.shape[1]], single[0], atol=1e-4, rtol=1e-4)


def test_adjacent_images_are_both_seen(pair):
    """The original takes two pictures with nothing between for one."""
    owl, processor = pair

    def logits(*colours: str) -> torch.Tensor:
        inputs = prompt_inputs(processor, [ask("image", "image", "circle ?")], [[picture(c) for c in colours]])
        return owl(**inputs).logits[:, -1]

    first = logits("red", "blue")
    assert not torch.allclose(first, logits("red", "green"), atol=1e-3)
    assert not torch.allclose(first, logits("green", "blue"), atol=1e-3)


def test_images_and_videos_stand_in_any_order(pair):
    """The original's generation gives a second video the first one's frames, and its training sees no video."""
    owl, processor = pair
    if not owl.config.abstractor_config.temporal:
        films = [[picture("red")] * 4]
        with pytest.raises(ValueError, match="videos of 4 frames need a model with temporal modules"):
            answer(owl, processor, [ask("video", "circle ?")], [[]], [films])
        return
    red, blue = [[picture(colour)] * 5 + [picture("white")] * 5 for colour in ("red", "blue")]
    talk = ask("video", "image", "circle ?", "video", "image", "square ?")

    def logits(images: list[bytes], videos: list[list[bytes]]) -> torch.Tensor:
        return owl(**prompt_inputs(processor, [talk], [images], [videos])).logits[:, -1]

    stills = [picture("green"), picture("black")]
    first = logits(stills, [red, blue])
    for other in (logits(stills, [red, red]), logits(stills, [blue, blue]), logits(stills[::-1], [red, blue])):
        assert not torch.allclose(first, other, atol=1e-4)
    inputs = prompt_inputs(processor, [talk], [stills], [[red, blue]])
    owl.train()(**inputs, labels=inputs["input_ids"].clamp(max=3)).loss.backward()
    moving = [name for name, p in owl.named_parameters() if "temporal" in name and p.grad is not None and p.grad.any()]
    assert any("temporal_visual_fc" in name for name in moving)
    assert any("temporal.conv" in name for name in moving)


def test_a_missing_image_is_refused_with_both_counts(pair):
    owl, processor = pair
    ids = torch.tensor([processor.encode(ask("image", "circle ?")).ids])
    with pytest.raises(ValueError, match=r"7 image placeholders .* but 0 visual tokens"):
        owl(input_ids=ids)
    with pytest.raises(ValueError, match="shows 1 pictures, but 2 were given"):
        answer(owl, processor, [ask("image", "circle ?")], [[picture("red")] * 2])


def test_text_alone_gives_every_trained_parameter_a_gradient(pair):
    """Else ranks of data parallelism that hold no picture wait for ever for those that do."""
    owl, _ = pair
    ids = torch.randint(3, 20, (1, 6))
    owl.train()(input_ids=ids, labels=ids).loss.backward()
    assert [name for name, p in owl.named_parameters() if p.grad is None] == []
    assert not owl.model.abstractor.vit_eos.grad.any()


def test_nothing_supervised_is_zero_loss_with_gradients(pair):
    """The original divides by zero."""
    owl, _ = pair
    ids = torch.randint(3, 20, (2, 6))
    loss = owl.train()(input_ids=ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in owl.parameters())


def test_labels_and_ids_come_back_as_they_went(pair):
    """The original writes into the labels it is given."""
    owl, processor = pair
    inputs = prompt_inputs(processor, [CONVERSATIONS[1][0]], [shown()[1]])
    before = {name: value.clone() for name, value in inputs.items()}
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= owl.config.image_token_id, -100)
    kept = labels.clone()
    owl(**inputs, labels=labels)
    assert torch.equal(labels, kept)
    assert all(torch.equal(value, before[name]) for name, value in inputs.items())


def test_visual_tokens_are_computed_once_for_each_picture(pair):
    owl, processor = pair
    calls = []
    owl.model.vision_model.register_forward_hook(lambda module, given, found: calls.append(1))
    inputs = prompt_inputs(processor, [CONVERSATIONS[3][0]], [shown()[3]])
    options = GenerationConfig(max_new_tokens=6, min_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0)
    owl.generate(**inputs, generation_config=options)
    assert len(calls) == 1


BEYOND_THE_VOCABULARY = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.19"),
    reason="transformers' repetition penalty looked placeholders up among the words before 5.19",
)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "no_repeat_ngram_size": 2},
        pytest.param({"repetition_penalty": 1.3}, marks=BEYOND_THE_VOCABULARY),
        {"do_sample": True, "top_k": 5, "top_p": 0.9, "temperature": 0.7},
    ],
)
def test_the_ways_to_generate(pair, options):
    owl, processor = pair
    conversation, pictures = CONVERSATIONS[3][0], shown()[3]
    torch.manual_seed(0)
    inputs = prompt_inputs(processor, [conversation], [pictures])
    config = generation_config(owl, processor, max_new_tokens=8, min_new_tokens=8, **options)
    made = owl.generate(**inputs, generation_config=config)[0, inputs["input_ids"].shape[1] :]
    assert len(made) == 8
    assert made.max() < owl.config.text_config.vocab_size


def test_a_stop_string_ends_the_answer_and_is_not_in_it(pair):
    owl, processor = pair
    conversations, pictures = [CONVERSATIONS[1][0], CONVERSATIONS[3][0]], [shown()[1], shown()[3]]
    free = answer(owl, processor, conversations, pictures, max_new_tokens=30, min_new_tokens=30)
    words = free[0].split()
    word = words[len(words) // 2]
    steps = []
    owl.lm_head.register_forward_hook(lambda module, given, found: steps.append(1))
    stopped = answer(owl, processor, conversations[:1], pictures[:1], max_new_tokens=30, stop_strings=[word])
    assert stopped[0] == free[0].partition(word)[0].strip()
    assert len(steps) < 30
    both = answer(owl, processor, conversations, pictures, max_new_tokens=30, min_new_tokens=30, stop_strings=[word])
    assert both == [text.partition(word)[0].strip() for text in free]


def test_loss_in_pieces_is_the_loss(pair, monkeypatch):
    owl, _ = pair
    ids = torch.randint(3, 20, (4, 40))
    whole = owl(input_ids=ids, labels=ids).loss
    whole.backward()
    wanted = {name: p.grad.clone() for name, p in owl.named_parameters() if p.grad is not None}
    owl.zero_grad()
    monkeypatch.setattr("owl_model.modeling.LOSS_ROWS", 17)
    seen = []
    owl.lm_head.register_forward_hook(lambda module, given, found: seen.append(found.shape[0]))
    pieces = owl(input_ids=ids, labels=ids).loss
    pieces.backward()
    assert max(seen) == 17
    torch.testing.assert_close(pieces, whole)
    for name, gradient in wanted.items():
        torch.testing.assert_close(owl.get_parameter(name).grad, gradient, msg=name)


@pytest.mark.parametrize("part", ["", "model.vision_model", "model.abstractor", "model.language_model"])
def test_gradient_checkpointing_of_any_part_changes_nothing(pair, part):
    """The original's abstractor cannot be checkpointed: a TypeError."""
    owl, processor = pair
    inputs = prompt_inputs(processor, [CONVERSATIONS[3][0]], [shown()[3]])
    labels = inputs["input_ids"].clamp(max=3)
    owl.train()

    def gradients() -> dict[str, torch.Tensor]:
        owl.zero_grad()
        owl(**inputs, labels=labels).loss.backward()
        return {name: p.grad.clone() for name, p in owl.named_parameters() if p.grad is not None}

    plain = gradients()
    module = owl.get_submodule(part) if part else owl
    checkpoint_activations(module)
    calls = []
    probe = owl.get_submodule(f"{part or 'model.abstractor'}.{PROBES[part or 'model.abstractor']}")
    probe.register_forward_pre_hook(lambda module, given: calls.append(1))
    again = gradients()
    assert len(calls) == 2  # once forward, once again for backward
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


PROBES = {
    "model.vision_model": "encoder.layers.0.mlp",
    "model.abstractor": "encoder.layers.0.crossattention.output.mlp",
    "model.language_model": "layers.0.mlp",
}


def test_bfloat16_computes_its_norms_in_fp32_and_stays_close(pair):
    owl, processor = pair
    inputs = prompt_inputs(processor, [CONVERSATIONS[3][0]], [shown()[3]])
    with torch.no_grad():
        exact = owl(**inputs).logits[:, -1]
        owl.to(torch.bfloat16)
        rough = owl(**inputs).logits[:, -1]
        norms = {name: m for name, m in owl.named_modules() if type(m).__name__ in ("LayerNorm", "LlamaRMSNorm")}
        for name, norm in norms.items():
            hidden = torch.randn(4, norm.weight.shape[0], dtype=torch.bfloat16)
            there = norm(hidden)
            wanted = deepcopy(norm).float()(hidden.float())
            torch.testing.assert_close(there.float(), wanted, rtol=2**-7, atol=1e-6, msg=name)  # rounded once or twice
    assert {name.split(".")[1] for name in norms} == {"vision_model", "abstractor", "language_model"}
    assert rough.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(exact, rough.float()).item() > 0.99


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_every_attention_gives_what_plain_attention_gives(pair, attention):
    owl, processor = pair
    inputs = prompt_inputs(processor, [CONVERSATIONS[i][0] for i in (0, 3)], [shown()[i] for i in (0, 3)])
    there = inputs["attention_mask"].bool()
    with torch.no_grad():
        owl.set_attn_implementation("eager")
        wanted = owl(**inputs).logits[there]
        owl.set_attn_implementation(attention)
        found = owl(**inputs).logits[there]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
