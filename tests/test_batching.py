"""The built-in engine: the tokens of `generate`, alone and in any batch, and pictures that are never mistaken."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import threading

import pytest
import torch
from endpoint import ANIMALS, assert_animals, lettered, png
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_inductor_cache
from transformers import ContinuousBatchingConfig

from owl_model.answering import generation_config, load, prompt_inputs
from owl_model.looking import looked
from pipelines.serving import attention
from pipelines.serving.batching import Batching, Decoder
from pipelines.serving.compiled import Compiled
from pipelines.serving.engine import Ask, Busy, Picture, Sampling, Unfit
from pipelines.serving.graphs import Graphs
from pipelines.serving.models import digest
from pipelines.serving.options import Room
from pipelines.serving.sampling import grammar_of, gumbel, keep_likeliest
from pipelines.serving.virtual import PictureIds

pytestmark = pytest.mark.skipif(
    "page_size" not in ContinuousBatchingConfig.__dataclass_fields__,
    reason="the built-in engine needs transformers 5.19 or newer",
)
GREEDY = Sampling()
ROOM = Room(tokens=4096, page=16, batch_tokens=128, requests=8, pictures=16)


WORDS = "what color is the circle square ? yes no one two three red large at top-left"


def asked(number: int, pictures: int) -> list[dict]:
    text = " ".join(random.Random(number).choices(WORDS.split(), k=3 + number % 17))
    return [{"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}]


def expected(owl, processor, messages: list[dict], pictures: list[bytes], longest: int, ends: bool = True) -> list[int]:
    inputs = prompt_inputs(processor, [messages], [pictures])
    chosen = generation_config(owl, processor, max_new_tokens=longest)
    if not ends:
        chosen.eos_token_id = None
    with torch.no_grad():
        made = owl.generate(**inputs, generation_config=chosen)
    return made[0, inputs["input_ids"].shape[1] :].tolist()


def where(owl, processor, messages: list[dict], pictures: list[bytes], answer: list[int]) -> list[torch.Tensor]:
    """Where an answer of PEFT's own model looked; its attention can be watched as the engine's can."""
    inner = owl.get_base_model()
    inner.model.language_model.set_attn_implementation(attention.register())
    pixels = torch.stack([processor.image_processor.pixels(data) for data in pictures])
    try:
        return looked(inner, processor.encode(messages, prompt=True).ids, answer, pixels)
    finally:
        inner.model.language_model.set_attn_implementation("sdpa")


class Asking:
    """An engine, and what it is asked."""

    def __init__(self, owl, processor, room: Room = ROOM, grammars=None):
        self.processor, self.engine, self.count = processor, Batching(owl, processor.end_id, room, grammars), 0

    async def ask(self, messages, pictures, longest, sampling: Sampling = GREEDY, delay: float = 0.0, adapter=""):
        await asyncio.sleep(delay)
        self.count += 1
        name = f"request-{self.count}"
        ids = self.processor.encode(messages, prompt=True).ids
        shown = [
            Picture(hashlib.sha256(data).hexdigest(), self.processor.image_processor.pixels(data).numpy())
            for data in pictures
        ]
        steps = [step async for step in self.engine.submit(Ask(name, ids, shown, sampling, longest, adapter=adapter))]
        assert steps[-1].finish in ("stop", "length")
        return [token for step in steps for token in step.tokens], [fact for step in steps for fact in step.told]


def parity(owl, processor, count: int, room: Room = ROOM, graphs: str = "") -> None:
    """Prompts with 0 to 4 pictures, which share some, arriving one after another. With ``graphs``, "plain" or
    "compiled", next tokens are computed as a GPU's graphs do, uncaptured."""
    held = [png(seed) for seed in range(6)]
    jobs = [(asked(n, n % 5), [held[(n + k) % 6] for k in range(n % 5)], 4 + n % 9) for n in range(count)]
    wanted = [expected(owl, processor, *job) for job in jobs]

    async def run() -> None:
        asking = Asking(owl, processor, room.model_copy(update={"queue": count}))
        if graphs:
            decoder = asking.engine.decoder
            parts = decoder.model, decoder.lm_head, decoder.pictures.words, decoder.slots
            decoder.graphs = Graphs(*parts, graphs == "compiled", forbidden=asking.engine.choice.forbidden.tolist())
        try:
            made = await asyncio.gather(*(asking.ask(*job, delay=0.01 * n) for n, job in enumerate(jobs)))
        finally:
            asking.engine.stop()
        assert [tokens for tokens, _ in made] == wanted
        assert not graphs or decoder.graphs.foreseen
        assert (await asking.engine.stats())["pictures_encoded"] == len(held)

    asyncio.run(run())


def test_tokens_equal_generate(pair):
    parity(*pair, count=24)


@pytest.mark.parametrize("graphs", ["plain", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_gpus_next_tokens_equal_generate(pair, graphs):
    torch._dynamo.reset()
    parity(*pair, count=24, graphs=graphs)


def test_steps_begun_ahead_are_used_where_they_were_right(pair):
    """Greedy answers are foreseen but for their first steps; where the likeliest token is not taken, nothing is."""
    owl, processor = pair
    greedy, drawn = Sampling(ignore_end=True), Sampling(ignore_end=True, temperature=1.0, seed=1)

    async def run(sampling: Sampling, ahead: bool) -> tuple[list, int]:
        asking = Asking(owl, processor)
        decoder = asking.engine.decoder
        if ahead:
            parts = decoder.model, decoder.lm_head, decoder.pictures.words, decoder.slots
            decoder.graphs = Graphs(*parts, False, forbidden=asking.engine.choice.forbidden.tolist())
        try:
            made = await asyncio.gather(*(asking.ask(asked(n, 0), [], 30, sampling) for n in range(3)))
        finally:
            asking.engine.stop()
        return made, decoder.graphs.foreseen if ahead else 0

    for sampling, at_least in ((greedy, 10), (drawn, 0)):
        plain, _ = asyncio.run(run(sampling, ahead=False))
        made, foreseen = asyncio.run(run(sampling, ahead=True))
        assert made == plain
        assert foreseen >= at_least
        assert at_least or not foreseen


@pytest.mark.slow
def test_two_hundred_prompts_equal_generate(pair):
    parity(*pair, count=200)


@pytest.mark.slow
def test_compiled_steps_give_the_same_tokens(pair):
    """By two graphs, which are there before the first request."""
    torch._dynamo.reset()
    counters.clear()
    parity(*pair, count=40, room=ROOM.model_copy(update={"compile": True}))
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
def test_who_is_answered_alone_has_a_graph_that_fits_any_slot_and_length(pair, monkeypatch):
    owl, processor = pair
    took, next_token = [], Compiled.next_token

    def seen(self, embeds, step):
        took.append(step.plan.together[0])
        return next_token(self, embeds, step)

    monkeypatch.setattr(Compiled, "next_token", seen)
    torch._dynamo.reset()
    counters.clear()
    jobs = [(asked(0, 0), [], 20), (asked(1, 0), [], 200), (asked(2, 1), [png(0)], 40)]
    endless = Sampling(ignore_end=True)

    async def run():
        asking = Asking(owl, processor, ROOM.model_copy(update={"compile": True}))
        try:
            both = await asyncio.gather(*(asking.ask(*job, endless) for job in jobs[:2]))  # the second is soon alone
            return [*both, await asking.ask(*jobs[2], endless)]
        finally:
            asking.engine.stop()

    made = [tokens for tokens, _ in asyncio.run(run())]
    assert made == [expected(owl, processor, *job, ends=False) for job in jobs]
    assert {piece.slot for piece in took} == {0, 1}
    assert len({piece.high - piece.low for piece in took}) > 100
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU multiplies no bf16")
def test_compiled_weights_are_packed(pair):
    owl, _ = pair
    decoder = Decoder(owl.bfloat16(), PictureIds(owl.get_input_embeddings(), owl.config.visual_tokens, 1))
    decoder.set_attn_implementation(attention.register())
    counters.clear()
    with fresh_inductor_cache():
        Compiled(decoder.model, decoder.lm_head).compile(owl.config.text_config, torch.bfloat16)
    assert counters["inductor"]["mkldnn_linear_weight_pack_matcher_count"] > 0


def test_an_answer_is_the_same_alone_and_in_a_batch(pair):
    owl, processor = pair
    picture = png(1)
    chosen = Sampling(temperature=1.2, seed=7, top_p=0.9, top_k=20, frequency_penalty=0.5, logprobs=3)
    others = [Sampling(temperature=1.5, seed=n) for n in range(6)]

    async def run():
        asking = Asking(owl, processor)
        try:
            alone = await asking.ask(asked(3, 1), [picture], 12, chosen)
            crowd = [asking.ask(asked(n, n % 2), [png(n)] * (n % 2), 16, some) for n, some in enumerate(others)]
            together = await asyncio.gather(asking.ask(asked(3, 1), [picture], 12, chosen, 0.01), *crowd)
            other_seed = await asking.ask(asked(3, 1), [picture], 12, chosen.model_copy(update={"seed": 8}))
        finally:
            asking.engine.stop()
        return alone, together[0], other_seed

    alone, together, other_seed = asyncio.run(run())
    assert alone[0] == together[0]
    assert other_seed[0] != alone[0]
    assert len(alone[1]) == len(alone[0])
    for one, two in zip(alone[1], together[1], strict=True):
        assert one["logprob"] == pytest.approx(two["logprob"], abs=1e-4)
        assert len(one["top"]) == 3
        assert one["logprob"] <= max(value for _, value in one["top"]) + 1e-6


def test_a_room_given_to_another_picture_does_not_change_answers(pair):
    """One room, four pictures by turns: with ids that were used again, answers came from another picture's keys."""
    owl, processor = pair
    held = [png(seed) for seed in range(4)]
    wanted = [expected(owl, processor, asked(0, 1), [data], 8) for data in held]
    assert len({tuple(tokens) for tokens in wanted}) > 1

    async def run():
        asking = Asking(owl, processor, ROOM.model_copy(update={"pictures": 1}))
        try:
            return [(await asking.ask(asked(0, 1), [held[n % 4]], 8))[0] for n in range(8)]
        finally:
            asking.engine.stop()

    assert asyncio.run(run()) == wanted + wanted


def test_who_stops_reading_frees_place_and_pictures(pair):
    owl, processor = pair

    async def run() -> None:
        asking = Asking(owl, processor, ROOM.model_copy(update={"pictures": 1}))
        engine = asking.engine
        try:
            ids = processor.encode(asked(0, 1), prompt=True).ids
            shown = [Picture("a", processor.image_processor.pixels(png(0)).numpy())]
            stream = engine.submit(Ask("left", ids, shown, Sampling(), 400))
            await anext(stream)
            with pytest.raises(Busy):
                engine.pictures.take("b", lambda: torch.zeros_like(engine.pictures.held[0]))
            await stream.aclose()
            stats = await engine.stats()
            assert stats["running"] == stats["waiting"] == 0
            assert (await asking.ask(asked(0, 1), [png(1)], 4))[0] == expected_after
        finally:
            engine.stop()

    expected_after = expected(owl, processor, asked(0, 1), [png(1)], 4)
    asyncio.run(run())


def test_who_leaves_while_a_picture_is_read_leaves_nothing_behind(pair):
    """However often it is told to go."""
    owl, processor = pair
    reading, go = threading.Event(), threading.Event()

    async def run() -> None:
        engine = Batching(owl, processor.end_id, ROOM)
        encode = engine.encode

        def slowly(picture):
            reading.set()
            go.wait(10)
            return encode(picture)

        engine.encode = slowly
        try:
            ids = processor.encode(asked(0, 1), prompt=True).ids
            shown = [Picture("a", processor.image_processor.pixels(png(0)).numpy())]
            asking = asyncio.ensure_future(anext(engine.submit(Ask("left", ids, shown, Sampling(), 400))))
            await asyncio.to_thread(reading.wait, 10)
            for _ in range(2):
                asking.cancel()
                await asyncio.sleep(0.01)
            assert engine.asked == 1
            go.set()
            await engine.drain()
            assert not engine.pictures.users
            assert asking.cancelled()
        finally:
            engine.stop()

    asyncio.run(run())


def test_a_picture_keeps_its_ids_and_others_never_get_them():
    words = torch.nn.Embedding(10, 4)
    pictures = PictureIds(words, tokens=2, rooms=2)
    taken = {}
    for name in "abcab":
        value = torch.full((2, 4), float(ord(name)))
        ids = pictures.take(name, lambda value=value: value)
        assert taken.setdefault(name, ids) == ids
        assert torch.equal(pictures(torch.tensor(ids)), value)
        pictures.let_go(ids)
    assert sorted(token for ids in taken.values() for token in ids) == list(range(10, 16))
    assert (pictures.encoded, pictures.known) == (5, 0)
    assert torch.equal(pictures(torch.tensor([3])), words(torch.tensor([3])))


def test_noise_and_limits():
    assert torch.equal(gumbel(50, 3, 4), gumbel(50, 3, 4))
    assert not torch.equal(gumbel(50, 3, 4), gumbel(50, 3, 5))
    row = torch.tensor([3.0, 1.0, 2.0, 0.0])
    keep_likeliest(row, 2, 1.0)
    assert row.tolist() == [3.0, -torch.inf, 2.0, -torch.inf]
    row = torch.tensor([0.5, 0.3, 0.2]).log()
    keep_likeliest(row, 0, 0.6)
    assert row.isinf().tolist() == [False, False, True]
    scores = torch.tensor([0.7, 0.2, 0.1]).log()
    drawn = torch.stack([(scores + gumbel(3, 0, place)).argmax() for place in range(4000)])
    assert drawn.bincount().div(4000).tolist() == pytest.approx([0.7, 0.2, 0.1], abs=0.03)


def test_an_answer_keeps_to_a_json_schema_alone_and_in_a_batch(shared, tmp_path):
    """On a tokenizer with letters; beside requests that are free."""
    llguidance = pytest.importorskip("llguidance.hf")
    owl, processor = load(lettered(tmp_path, shared))
    tokenizer = processor.tokenizer
    held = Sampling(temperature=1.0, seed=3, schema_=json.dumps(ANIMALS))
    grammars = llguidance.from_tokenizer(tokenizer, n_vocab=len(tokenizer))

    async def run():
        asking = Asking(owl, processor, grammars=grammars)
        try:
            alone = await asking.ask(asked(0, 1), [png(0)], 60, held)
            crowd = [asking.ask(asked(n, 0), [], 40, Sampling(temperature=1.0, seed=n)) for n in range(4)]
            return alone[0], (await asyncio.gather(asking.ask(asked(0, 1), [png(0)], 60, held, 0.01), *crowd))[0][0]
        finally:
            asking.engine.stop()

    alone, together = asyncio.run(run())
    assert alone == together
    assert_animals(tokenizer.decode(alone, skip_special_tokens=True))


def test_a_schema_that_cannot_be_held_to_is_refused():
    with pytest.raises(Unfit, match="type"):
        grammar_of(json.dumps({"type": "nonsense"}))


def test_requests_of_several_adapters_share_a_batch(pair, tmp_path):
    """Each gets the tokens that PEFT's own model of its adapter generates, alone and beside the others."""
    owl, processor = pair
    jobs = [(asked(n, n % 2), [png(n)] * (n % 2), 8) for n in range(6)]
    wanted, names = {"": [expected(owl, processor, *job) for job in jobs]}, [""]
    maps = []
    for number in range(2):
        torch.manual_seed(number)
        doubled = r"v_proj\.multiway\.[01]" if owl.config.modality_adaptive else "v_proj"
        targets = rf"model\.language_model\..*\.(q_proj|down_proj|{doubled})"
        adapted = get_peft_model(owl, LoraConfig(r=4, lora_alpha=64, target_modules=targets))
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.5)
        folder = str(tmp_path / f"adapter{number}")
        adapted.save_pretrained(folder)
        names.append(f"{folder}@{digest(folder)}")
        wanted[names[-1]] = [expected(adapted, processor, *job) for job in jobs]
        maps.append(where(adapted, processor, *jobs[1][:2], wanted[names[-1]][1]))
        owl = adapted.unload()
    assert wanted[names[0]] != wanted[names[1]] != wanted[names[2]]

    async def run():
        asking = Asking(owl, processor)
        try:
            every = [asking.ask(*job, delay=0.003 * n, adapter=name) for n, job in enumerate(jobs) for name in names]
            made = await asyncio.gather(*every)
            ids = processor.encode(jobs[1][0], prompt=True).ids
            pictures = [Picture("1", processor.image_processor.pixels(data).numpy()) for data in jobs[1][1]]
            seen = [
                await asking.engine.looked(Ask("seen", ids, pictures, GREEDY, 8, adapter=name), wanted[name][1])
                for name in names[1:]
            ]
            return made, seen
        finally:
            asking.engine.stop()

    told, seen = asyncio.run(run())
    made = [tokens for tokens, _ in told]
    for place, name in enumerate(names):
        assert made[place :: len(names)] == wanted[name]
    for (grid,), (right,) in zip(seen, maps, strict=True):
        assert torch.allclose(torch.from_numpy(grid), right, atol=1e-6)
    assert not torch.allclose(maps[0][0], maps[1][0], atol=1e-4)
