"""Order, feed, step and stages; and a real run that is killed and goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BloomConfig

from owl_model import OwlAbstractorConfig, OwlConfig, OwlForConditionalGeneration, OwlVisionConfig
from owl_model.packed import cuts_of
from pipelines import storage
from pipelines.curation.curate import curate
from pipelines.curation.options import Curation
from pipelines.settings import OwlError, SettingError, with_overrides
from pipelines.training import stages
from pipelines.training.cache import Cache
from pipelines.training.dataset import Dataset
from pipelines.training.feed import Feed, Kept, Looks
from pipelines.training.loop import layers_of, patches_of, refuse_packing
from pipelines.training.order import Mixture, Order, positions, shares_of
from pipelines.training.packing import plan, share_out
from pipelines.training.stages import Stage
from pipelines.training.state import is_whole, seal
from pipelines.training.step import NonFinite, Optimization, build_optimizers, schedule, train_step
from pipelines.training.train import train
from pipelines.training.watch import operations


@pytest.fixture(scope="module")
def datasets(cluster, world, tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("datasets")
    for part in ("pairs", "instructions", "text"):
        settings = Curation() if part == "pairs" else Curation(deduplication=None)
        curate([f"{world}/raw/{part}"], f"{root}/{part}", settings)
    return {part: f"{root}/{part}" for part in ("pairs", "instructions", "text")}


def test_every_epoch_is_a_permutation_and_no_two_are_alike():
    order = Order((5, 7, 3, 9), seed=4)
    epochs = [[order.at(p)[:2] for p in range(24 * e, 24 * (e + 1))] for e in range(3)]
    everything = sorted((s, r) for s, n in enumerate(order.rows) for r in range(n))
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_global_batch_is_the_same_for_any_number_of_workers(world_size):
    together = [p for rank in range(world_size) for p in positions(3, 12, rank, world_size)]
    assert sorted(together) == list(range(36, 48))


def test_a_mixture_holds_to_its_shares_and_repeats_no_sample_within_an_epoch():
    orders = (Order((500, 300), 1), Order((7, 4), 2), Order((2000,), 3))
    mixture = Mixture(orders, shares_of((0.7, 0.1, 0.2)), seed=5)
    assert mixture.shares == (700, 100, 200)
    places = [mixture.at(position) for position in range(3300)]
    counts = Counter(place.shard for place in places)
    assert [counts[shard] for shard in range(5)] == mixture.seen(3300).tolist()
    for first, last, rows in ((0, 2, 800), (2, 4, 11), (4, 5, 2000)):
        mine = [place for place in places if first <= place.shard < last]
        assert [place.epoch for place in mine] == [number // rows for number in range(len(mine))]
        for epoch in range(len(mine) // rows):
            assert len({place[:2] for place in mine if place.epoch == epoch}) == rows
    sizes = [sum(first <= place.shard < last for place in places[:3000]) for first, last in ((0, 2), (2, 4), (4, 5))]
    assert sizes == [2100, 300, 600]
    assert [mixture.at(position) for position in range(3000, 3010)] == places[3000:3010]


@pytest.mark.parametrize("weights", [(1,), (1, 1, 1), (5, 1e-9), (1, 2, 3, 4, 5.5), tuple(range(1, 40))])
def test_shares_make_a_cycle(weights):
    shares = shares_of(weights)
    assert sum(shares) == 1000
    assert min(shares) >= 1
    assert all(abs(share - 1000 * weight / sum(weights)) <= 1 for share, weight in zip(shares, weights, strict=True))


def test_dropped_duplicates_are_not_fed(datasets):
    dataset = Dataset([datasets["pairs"]])
    keys = [dataset.read(s, r)["key"] for s, n in enumerate(dataset.rows) for r in range(n)]
    assert len(keys) == len(set(keys))
    hashes = [dataset.read(s, r)["sha256"] for s, n in enumerate(dataset.rows) for r in range(n)]
    assert len(hashes) == len(set(hashes))


def test_a_batch_depends_on_its_step_alone(datasets, processor):
    dataset = Dataset([datasets["instructions"]])
    order = Order(dataset.rows, seed=1)
    straight = list(Feed(dataset, processor, order, 4).batches(0, 6))
    later = next(Feed(dataset, processor, order, 4).batches(5, 6))
    assert later[0].keys == straight[5][0].keys
    assert torch.equal(later[0].inputs["input_ids"], straight[5][0].inputs["input_ids"])


def test_a_frozen_encoder_looks_at_each_picture_once(cluster, world, processor, tmp_path):
    """Also where several samples show the same one, as many questions about one picture do."""
    seen = []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return pixels.mean(dim=(2, 3))[:, None]

    curate([f"{world}/raw/pairs"], str(tmp_path), Curation(deduplication=None))
    dataset = Dataset([str(tmp_path)])
    order = Order(dataset.rows, seed=0)
    feed = Feed(dataset, processor, order, len(order), looks=Looks(encode=encode))
    plain = Feed(dataset, processor, order, len(order))
    (first,), (second,) = ([feed.encoded(batch) for batch in feed.batch(step)] for step in (0, 1))
    places = [(shard, row) for shard, rows in enumerate(dataset.rows) for row in range(rows)]
    shown = [dataset.read(*place, ("sha256",))["sha256"] for place in places]
    assert sum(seen) == len(set(shown)) < len(shown)  # the shards hold planted duplicates
    for step, batch in enumerate((first, second)):
        (whole,) = plain.batch(step)
        assert batch.keys == whole.keys
        assert torch.allclose(batch.inputs["vision_features"], encode(whole.inputs["pixel_values"]))


def test_what_is_kept_stays_and_stays_within_its_limit():
    kept = Kept(limit=100)
    for key in range(10):
        kept.put(key, torch.zeros(10))
    assert kept.size == 80
    assert [key for key in range(10) if kept.get(key) is not None] == [0, 1]


@pytest.mark.parametrize(
    ("stage", "moving"),
    [("language", {"language"}), ("stage1", {"vision", "abstractor"}), ("stage2", {"abstractor", "language"})],
)
def test_only_what_the_table_says_moves(owl, datasets, processor, stage, moving):
    trains = stages.STAGES[stage]
    model = stages.prepare(owl, trains, stages.Lora(dropout=0.0))
    stages.train_mode(owl, trains)
    counts = stages.count_parameters(owl)
    assert {name for name, count in counts.items() if count["trainable"]} == moving
    before = {name: value.clone() for name, value in owl.named_parameters()}
    dataset = Dataset([datasets["instructions"]])
    feed = Feed(dataset, processor, Order(dataset.rows, 0), 8, looks=Looks(pictures=trains.pictures))
    settings = Optimization(learning_rate=1e-2, warmup=1)
    for step in range(2):  # LoRA's first matrix moves only after its second has
        train_step(model, feed.batch(step), build_optimizers(model, settings), settings, 1.0)
    moved = {name for name, value in owl.named_parameters() if not torch.equal(value, before[name])}
    trainable = {name for name, value in owl.named_parameters() if value.requires_grad}
    assert moved <= trainable
    if stage == "stage2":
        assert all("lora_" in name for name in moved if "language_model" in name)
        assert any("lora_" in name for name in moved)
    assert any("abstractor" in name for name in moved) == ("abstractor" in moving)


def test_accumulated_micro_batches_equal_one_batch(model_folder, datasets, processor):
    """1 × 8 and 8 × 1, and uneven pieces: one loss, one gradient."""
    dataset = Dataset([datasets["pairs"], datasets["instructions"], datasets["text"]])
    order = dataset.order(0, [1, 1, 1])
    settings = Optimization(learning_rate=1e-3, warmup=1)
    results = []
    for micro in (8, 1, 3):
        owl = OwlForConditionalGeneration.from_pretrained(model_folder)
        model = stages.prepare(owl, stages.STAGES["stage1"], stages.Lora())
        stages.train_mode(owl, stages.STAGES["stage1"])
        feed = Feed(dataset, processor, order, 8, micro_batch=micro)
        optimizers = build_optimizers(model, settings)
        losses = [
            train_step(model, feed.batch(step), optimizers, settings, 1.0, datasets=3)["loss"] for step in range(3)
        ]
        results.append((losses, {name: value.clone() for name, value in owl.named_parameters()}))
    assert [len(Feed(dataset, processor, order, 8, micro_batch=micro).batch(0)) for micro in (8, 1, 3)] == [1, 8, 3]
    for losses, weights in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-6)
        for name, value in weights.items():
            torch.testing.assert_close(value, results[0][1][name], atol=1e-5, rtol=0)


def test_rows_are_packed_full_and_shared_out_evenly():
    random = np.random.default_rng(0)
    for _ in range(50):
        lengths = random.integers(1, 120, size=random.integers(1, 200)).tolist()
        pictures = random.integers(0, 2, size=len(lengths)).tolist()
        world = int(random.integers(1, 5))
        ranks = plan(lengths, pictures, 100, world)
        rows = [row for mine in ranks for row in mine]
        assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= 100 or len(row) == 1 for row in rows)
        assert max(map(len, ranks)) == -(-len(rows) // world)
        assert len(rows) <= 1.25 * sum(min(length, 100) for length in lengths) / 100 + 2
        assert sorted(map(sorted, rows)) == sorted(map(sorted, plan(lengths, pictures, 100, 1)[0]))
    costs = [sum(random.integers(1, 100, size=400)) for _ in range(64)]
    loads = [sum(costs[row] for row in mine) for mine in share_out(costs, 4)]
    assert max(loads) < 1.01 * min(loads)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_samples_do_not_see_each_other(pair, datasets, checkpointing):
    """Each family: loss and gradients of a packed batch, pictures and texts mixed, equal those of one sample a row."""
    owl, processor = pair
    if checkpointing:
        owl.activation_checkpointing_enable()
    dataset = Dataset([datasets["pairs"], datasets["instructions"], datasets["text"]])
    order = dataset.order(0, [1, 1, 1])
    found = []
    for pack_tokens in (0, 128):
        feed = Feed(dataset, processor, order, 12, pack_tokens=pack_tokens, max_tokens=128)
        (batch,) = feed.batch(0)
        owl.train().zero_grad()
        out = owl(**batch.inputs)
        out.loss.backward()
        losses = [out.token_losses[batch.datasets == which].sum() for which in range(3)]
        found.append((batch, out.loss, torch.stack(losses), {n: p.grad.clone() for n, p in owl.named_parameters()}))
    (one, loss, losses, gradients), (packed, packed_loss, packed_losses, packed_gradients) = found
    assert len(packed.inputs["labels"]) < len(one.inputs["labels"])
    assert sorted(packed.keys) == sorted(one.keys)
    assert (packed.supervised, packed.tokens, packed.pictures) == (one.supervised, one.tokens, one.pictures)
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(packed_losses, losses, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_cuts_are_where_samples_begin():
    """What a GPU's attention of packed rows is given, in place of a mask; the padding is one sample more."""
    found = cuts_of(torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]]))
    assert found["cuts"].tolist() == [0, 3, 5, 6, 8, 12]
    assert found["longest"] == 4


def test_packing_is_refused_where_samples_would_see_each_other(processor):
    text = BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=len(processor.tokenizer))
    vision = OwlVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    abstractor = OwlAbstractorConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, encoder_hidden_size=16
    )
    config = OwlConfig(vision_config=vision, abstractor_config=abstractor, text_config=text)
    with pytest.raises(OwlError, match="pack_tokens does not fit this language model"):
        refuse_packing(OwlForConditionalGeneration(config), processor)


def test_a_sample_that_is_too_long_is_cut_and_counted(datasets, processor):
    dataset = Dataset([datasets["instructions"]])
    whole = Feed(dataset, processor, Order(dataset.rows, 0), 8).batch(0)[0]
    longest = int(whole.inputs["attention_mask"].sum(dim=1).max())
    (cut,) = Feed(dataset, processor, Order(dataset.rows, 0), 8, max_tokens=longest - 1).batch(0)
    assert whole.cut == 0
    assert 1 <= cut.cut == int((whole.inputs["attention_mask"].sum(dim=1) == longest).sum())
    assert cut.pictures == whole.pictures
    (none,) = Feed(dataset, processor, Order(dataset.rows, 0), 8, max_tokens=3).batch(0)
    assert (none.cut, none.pictures, none.supervised, none.unsupervised) == (8, 0, 0, 8)  # no room for any picture


def test_a_crop_is_another_each_epoch_and_the_same_each_time(datasets, processor):
    dataset = Dataset([datasets["pairs"]])
    order = Order(dataset.rows, 0)
    batches = [
        Feed(dataset, processor, order, len(order), looks=Looks(crop=0.6)).batch(epoch)[0] for epoch in (0, 0, 1)
    ]
    pictures = [dict(zip(batch.keys, batch.inputs["pixel_values"], strict=True)) for batch in batches]
    assert all(torch.equal(pictures[0][key], pictures[1][key]) for key in pictures[0])
    assert sum(torch.equal(pictures[0][key], pictures[2][key]) for key in pictures[0]) < len(pictures[0]) / 10


def test_remote_shards_are_copied_ahead_checked_and_held_to_a_size(datasets, processor, tmp_path):
    """fsspec's memory:// stands for a bucket here; tests/test_exactness.py has a real one."""
    files, plain = storage.filesystem("memory://bucket/pairs")
    files.put(f"{datasets['pairs']}/", plain, recursive=True)
    cache = Cache(1, f"{tmp_path}/cache")  # so small that each new shard drives out the others
    dataset = Dataset(["memory://bucket/pairs"], cache)
    here = Dataset([datasets["pairs"]])
    order = Order(here.rows, 0)
    for step in range(3):
        (far,), (near,) = (Feed(each, processor, order, 8).batch(step) for each in (dataset, here))
        assert far.keys == near.keys
        assert torch.equal(far.inputs["pixel_values"], near.inputs["pixel_values"])
    for future in cache.coming.values():
        future.result()
    assert len(list((tmp_path / "cache").iterdir())) <= 4  # as many as are copied at once
    name = storage.listing("memory://bucket/pairs/shards", ".arrow")[0]
    with storage.open_read(name) as file:
        content = file.read()
    with storage.open_write(name) as file:
        file.write(content[:-9] + b"x" + content[-8:])
    fresh = Dataset(["memory://bucket/pairs"], Cache(1 << 30, f"{tmp_path}/fresh"))
    with pytest.raises(OwlError, match="is not what its manifest says"):
        [fresh.read(shard, 0) for shard in range(len(fresh.rows))]
    files.rm("/bucket", recursive=True)


def test_a_shard_that_is_removed_before_it_is_opened_is_copied_again(datasets, tmp_path, monkeypatch):
    """As another worker may do at any moment; one that never stays is told of."""
    files, plain = storage.filesystem("memory://other/pairs")
    files.put(f"{datasets['pairs']}/", plain, recursive=True)
    name, *_ = storage.listing("memory://other/pairs/shards", ".arrow")
    cache, left = Cache(1 << 30, f"{tmp_path}/cache"), 3
    utime = os.utime

    def too_late(path) -> None:
        nonlocal left
        if left > 0:
            os.unlink(path)
        left -= 1
        utime(path)

    monkeypatch.setattr(os, "utime", too_late)
    assert cache.table(name, None).equals(storage.read_arrow(name))
    left = 1000
    with pytest.raises(OwlError, match="raise cache_gigabytes"):
        cache.table(name, None)
    files.rm("/other", recursive=True)


def test_lower_layers_of_the_vision_encoder_learn_slower(owl):
    stages.prepare(owl, stages.STAGES["stage1"], stages.Lora())
    settings = Optimization(learning_rate=1.0, layer_decay=0.5)
    (adamw,) = build_optimizers(owl, settings)
    rates = {id(p): group["peak"] for group in adamw.param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in owl.named_parameters() if p.requires_grad}
    layers = owl.config.vision_config.num_hidden_layers
    assert {rate for name, rate in named.items() if "abstractor" in name} == {1.0}
    for number in range(layers):
        assert {rate for name, rate in named.items() if f"layers.{number}." in name and "vision_model" in name} == {
            0.5 ** (layers - number)
        }
    assert named["model.vision_model.embeddings.cls_token"] == 0.5 ** (layers + 1)


def test_the_visual_side_alone_learns(pair):
    owl, _ = pair
    if not owl.config.modality_adaptive:
        with pytest.raises(OwlError, match="the model lacks"):
            stages.prepare(owl, stages.STAGES["owl2_stage1"], stages.Lora())
        return
    stages.prepare(owl, stages.STAGES["owl2_stage1"], stages.Lora())
    learning = {name for name, p in owl.named_parameters() if p.requires_grad and "language_model" in name}
    assert learning
    assert all(".multiway.1." in name for name in learning)
    assert not owl.lm_head.weight.requires_grad


def test_frozen_weights_rest_in_bf16(owl, datasets, processor):
    trains = stages.STAGES["stage2"]
    model = stages.prepare(owl, trains, stages.Lora(dropout=0.0))
    stages.train_mode(owl, trains)
    stages.freeze_in(owl, torch.bfloat16)
    assert {p.dtype for p in owl.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in owl.parameters() if not p.requires_grad} == {torch.bfloat16}
    dataset = Dataset([datasets["instructions"]])
    settings = Optimization(learning_rate=1e-2, warmup=1)
    optimizers = build_optimizers(model, settings)
    batch = Feed(dataset, processor, Order(dataset.rows, 0), 8).batch(0)
    losses = [train_step(model, batch, optimizers, settings, 1.0, torch.bfloat16)["loss"] for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1


def test_operations_are_near_what_is_counted(owl, datasets, processor):
    """The usual count, against PyTorch's counter, at a length where attention scores weigh little."""
    stages.prepare(owl, stages.STAGES["stage1"], stages.Lora())
    stages.train_mode(owl, stages.STAGES["stage1"])
    dataset = Dataset([datasets["pairs"]])
    (batch,) = Feed(dataset, processor, Order(dataset.rows, 0), 16).batch(0)
    with FlopCounterMode(display=False) as counter:
        owl(**batch.inputs).loss.backward()
    counted = operations(stages.count_parameters(owl), batch.inputs["labels"].numel(), batch.pictures, patches_of(owl))
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.3)


def test_a_thousand_shards_open_at_once(tmp_path):
    entries = [{"shard": f"s{number}", "kept": 100 + number} for number in range(1000)]
    storage.write_json(f"{tmp_path}/manifest.json", {"shards": [*entries, {"shard": "empty", "kept": 0}]})
    dataset = Dataset([str(tmp_path)])  # no shard is there: nothing but the manifest is read
    assert dataset.rows == tuple(100 + number for number in range(1000))


def test_a_sample_with_nothing_supervised_adds_nothing_and_is_counted(owl, datasets, processor):
    dataset = Dataset([datasets["instructions"]])
    feed = Feed(dataset, processor, Order(dataset.rows, 0), 4)
    answered = feed.conversation
    feed.conversation = lambda *sample: [m for m in answered(*sample) if m["role"] != "assistant"]
    (silent,) = feed.batch(0)
    assert (silent.supervised, silent.unsupervised) == (0, 4)
    model = stages.prepare(owl, stages.STAGES["stage1"], stages.Lora())
    before = {name: value.clone() for name, value in owl.named_parameters()}
    settings = Optimization(weight_decay=0.0)
    metrics = train_step(model, [silent], build_optimizers(model, settings), settings, 1.0)
    assert (metrics["loss"], metrics["supervised"], metrics["unsupervised"]) == (0.0, 0, 4)
    assert all(torch.equal(value, before[name]) for name, value in owl.named_parameters())


def test_lora_reaches_both_copies_of_the_adaptive_module(pair):
    owl, _ = pair
    stages.prepare(owl, stages.STAGES["stage2"], stages.Lora(targets=["q_proj", "v_proj"]))
    adapted = {name.partition(".lora_A")[0] for name, p in owl.named_parameters() if "lora_A" in name}
    ways = ["v_proj.multiway.0", "v_proj.multiway.1"] if owl.config.modality_adaptive else ["v_proj"]
    assert {name.partition("self_attn.")[2] for name in adapted} == {"q_proj", *ways}
    with pytest.raises(OwlError, match="no linear module of the language model is called key"):
        stages.prepare(owl, stages.STAGES["stage2"], stages.Lora(targets=["key"]))


def test_a_loss_that_is_no_number_stops_before_the_optimizer_moves(owl, datasets, processor):
    model = stages.prepare(owl, stages.STAGES["stage1"], stages.Lora())
    with torch.no_grad():
        owl.model.abstractor.visual_fc.weight[0, 0] = float("nan")
    before = owl.model.abstractor.query_tokens.clone()
    dataset = Dataset([datasets["pairs"]])
    batches = Feed(dataset, processor, Order(dataset.rows, 0), 2).batch(0)
    settings = Optimization()
    with pytest.raises(NonFinite, match=batches[0].keys[0]):
        train_step(model, batches, build_optimizers(model, settings), settings, 1.0)
    assert torch.equal(before, owl.model.abstractor.query_tokens)


def test_schedule_warms_up_and_falls_to_zero():
    rates = [schedule(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[-1] < 0.001


def test_misspelt_settings_are_refused_with_the_nearest_name():
    with pytest.raises(SettingError, match="unknown setting 'stpes'; did you mean 'steps'"):
        with_overrides(Stage(), {"stpes": "3"})
    with pytest.raises(SettingError, match="setting steps cannot be 'many'"):
        with_overrides(Stage(), {"steps": "many"})
    assert with_overrides(Stage(), {"optimization.warmup": "7"}).optimization.warmup == 7


def test_stage_one_on_two_workers(cluster, datasets, model_folder, tmp_path):
    """And what is seen of it: log, keys, TensorBoard, validation beside it, the report."""
    settings = Stage(
        data=[datasets["pairs"], datasets["instructions"]],
        weights=[3, 1],
        start=model_folder,
        steps=8,
        batch_size=8,
        workers=2,
        checkpoint_every=2,
        keep_checkpoints=1,
        keep_by="validation_loss",
        log_every=1,
        log_keys=True,
        validation=[datasets["instructions"]],
        validate_every=4,
        validation_samples=20,
        optimization=Optimization(learning_rate=1e-3, warmup=2),
    )
    run = tmp_path / "run"
    log = train("stage1", settings, str(run))
    assert [entry["step"] for entry in log["history"]] == list(range(1, 9))
    before = OwlForConditionalGeneration.from_pretrained(model_folder).state_dict()
    after = OwlForConditionalGeneration.from_pretrained(f"{run}/model").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("model.vision_model", "model.abstractor")) for name in changed)
    last = log["history"][-1]
    assert set(last["norms"]) == {"vision", "abstractor"}
    assert set(last["losses"]) == {f"{datasets['pairs']}@1", f"{datasets['instructions']}@1"}
    assert last["compute"] + last["wait"] + last["checkpoint"] == pytest.approx(1)
    assert 0 < last["share_of_peak"] < 1
    assert sum(log["used"].values()) == 64
    keys = [storage.read_json(path) for path in storage.listing(f"{run}/keys", ".json")]
    assert sum(len(batch) for part in keys for batch in part.values()) == 64
    (check,) = [storage.read_json(path) for path in storage.listing(f"{run}/validation", ".json")]
    assert check["step"] == 4
    kept = [storage.name_of(path) for path in storage.listing(f"{run}/checkpoints", "") if "step_" in path]
    assert kept == ["step_00000004", "step_00000006"]  # the best that was measured, and the last
    assert check["samples"] == 20
    assert check["validation_loss"] == pytest.approx(log["history"][3]["loss"], rel=0.5)
    assert all(set(told) == {"key", "asked", "answer", "expected", "picture"} for told in check["answers"])
    assert list((run / "tensorboard").iterdir())
    page = (run / "report.html").read_text()
    assert all(word in page for word in ("validation", "pairs", "abstractor", "Answers after 4 steps"))
    assert train("stage1", settings, str(run)) == log
    with pytest.raises(OwlError, match="steps 8 → 9"):
        train("stage1", settings.model_copy(update={"steps": 9}), str(run))


@pytest.mark.slow
def test_compiled_layers_compute_the_same(model_folder, datasets, processor):
    dataset = Dataset([datasets["pairs"]])
    losses = []
    for compiled in (False, True):
        owl = OwlForConditionalGeneration.from_pretrained(model_folder)
        model = stages.prepare(owl, stages.STAGES["stage1"], stages.Lora())
        stages.train_mode(owl, stages.STAGES["stage1"])
        for layer in layers_of(model) if compiled else ():
            layer.compile()
        settings = Optimization(learning_rate=1e-3, warmup=1)
        optimizers = build_optimizers(model, settings)
        feed = Feed(dataset, processor, Order(dataset.rows, 0), 8)
        losses.append([train_step(model, feed.batch(step), optimizers, settings, 1.0)["loss"] for step in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_damaged_checkpoint_does_not_count(tmp_path):
    for rank in range(2):
        part = tmp_path / str(rank)
        part.mkdir()
        (part / f"__{rank}_0.distcp").write_bytes(bytes(1000))
        if rank == 0:
            (part / ".metadata").write_bytes(b"what is where")
        seal(part, rank, 2)
    whole = tmp_path / "whole"
    for rank in range(2):
        assert not is_whole(whole)
        shutil.copytree(tmp_path / str(rank), whole, dirs_exist_ok=True)
    assert is_whole(whole)
    (whole / "__1_0.distcp").write_bytes(bytes(999) + b"x")
    assert not is_whole(whole)


def test_what_a_worker_refuses_is_told_in_one_sentence(cluster, datasets, model_folder, tmp_path):
    settings = Stage(data=[datasets["pairs"]], start=model_folder, image_size=90, max_failures=0)
    with pytest.raises(OwlError, match=r"^stage1 stopped: image_size 90 does not fit .* not cut into patches of 24$"):
        train("stage1", settings, f"{tmp_path}/run")


WAYS = {"one worker": {"workers": 1}, "DDP": {"workers": 2}, "FSDP2": {"workers": 2, "sharding": "weights"}}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_workers_and_sharding_change_nothing(cluster, datasets, model_folder, tmp_path, stage):
    """A mixture with texts, so that ranks meet batches with and without pictures: 20 steps on one worker, on two, and
    on two that share the weights out."""
    settings = Stage(
        data=[datasets["text"], datasets["instructions"]],
        weights=[3, 1],
        start=model_folder,
        steps=20,
        batch_size=4,
        micro_batch=1,
        checkpoint_every=10,
        log_every=1,
        lora=stages.Lora(dropout=0.0),
        optimization=Optimization(learning_rate=1e-3, warmup=2),
    )
    losses, weights = {}, {}
    for name, way in WAYS.items():
        log = train(stage, settings.model_copy(update=way), f"{tmp_path}/{name}")
        losses[name] = [entry["loss"] for entry in log["history"]]
        weights[name] = OwlForConditionalGeneration.from_pretrained(f"{tmp_path}/{name}/model").state_dict()
        assert sum(log["used"].values()) == 80
        assert log["used"][f"{datasets['text']}@1"] == pytest.approx(60, abs=12)
    for name in ("DDP", "FSDP2"):
        assert losses[name] == pytest.approx(losses["one worker"], rel=1e-5), name
        for key, value in weights[name].items():
            torch.testing.assert_close(value, weights["one worker"][key], atol=1e-5, rtol=0, msg=f"{name} {key}")


@pytest.mark.slow
def test_killed_driver_goes_on_to_the_same_losses(datasets, model_folder, tmp_path):
    command = [sys.executable, "-m", "jobs.cli", "train", "stage1", "--recipe", "demo", "--data", datasets["pairs"]]
    command += ["--start", model_folder, "--set", "steps=60", "--set", "checkpoint_every=10", "--set", "log_every=1"]
    killed = subprocess.Popen([*command, "--run", f"{tmp_path}/killed"], stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "killed/checkpoints"
    deadline = time.time() + 120
    while time.time() < deadline and not list(checkpoints.glob("step_*")):
        time.sleep(0.05)
    time.sleep(1.0)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    for name in ("killed", "calm"):
        subprocess.run([*command, "--run", f"{tmp_path}/{name}"], check=True, capture_output=True, timeout=300)
    a = OwlForConditionalGeneration.from_pretrained(f"{tmp_path}/killed/model").state_dict()
    b = OwlForConditionalGeneration.from_pretrained(f"{tmp_path}/calm/model").state_dict()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0)
