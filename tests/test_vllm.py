"""vLLM as the engine, in its own environment (`make vllm`), behind our gateway on Ray Serve."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import requests
import torch
from conftest import wide_random
from endpoint import ANIMALS, assert_animals, lettered, png, shown
from peft import LoraConfig, get_peft_model

from owl_model.answering import generation_config, prompt_inputs
from pipelines.serving.keys import new_key
from pipelines.serving.options import Room, Serving
from pipelines.serving.serve import running

pytestmark = pytest.mark.slow
PYTHON = Path(".vllm/bin/python").absolute()
SECRET, KEY = new_key("tester")
ROOM = Room(tokens=8192, requests=8, queue=300, pictures=16)
WORDS = "what color is the circle square ? yes no one two three red large at top-left"
COUNT = 200
WIDTH = 128
"""vLLM's attention on CPUs takes heads of 32 and more."""


@pytest.fixture(scope="module")
def python() -> str:
    if not PYTHON.exists():
        pytest.skip("no vLLM; `make vllm` installs it")
    return str(PYTHON)


def asked(number: int, pictures: list[bytes]) -> list[dict]:
    return shown(*pictures, text=" ".join(random.Random(number).choices(WORDS.split(), k=3 + number % 17)))


def expected(owl, processor, number: int, pictures: list[bytes], longest: int) -> list[int]:
    """What `generate` says to the same question."""
    text = asked(number, [])[0]["content"][0]["text"]
    messages = [{"role": "user", "content": [{"type": "image"}] * len(pictures) + [{"type": "text", "text": text}]}]
    inputs = prompt_inputs(processor, [messages], [pictures])
    with torch.no_grad():
        made = owl.generate(**inputs, generation_config=generation_config(owl, processor, max_new_tokens=longest))
    return made[0, inputs["input_ids"].shape[1] :].tolist()


class Endpoint:
    def __init__(self, address: str):
        self.address = address
        self.client = openai.OpenAI(base_url=f"{address}/v1", api_key=SECRET, max_retries=0)

    def ask(self, messages: list[dict], longest: int, delay: float = 0.0, **more) -> tuple[list[list[int]], object]:
        """Each choice's token ids, and the answer."""
        time.sleep(delay)
        extra = {"receipt": True} | more.pop("extra_body", {})
        fields = {"model": "owl", "max_tokens": longest, "temperature": 0} | more
        said = self.client.chat.completions.create(messages=messages, extra_body=extra, **fields)
        return [choice["token_ids"] for choice in said.model_extra["owl"]["receipt"]["choices"]], said

    def together(self, jobs: list[tuple[list[dict], int, dict]]) -> list[list[int]]:
        """Arriving one after another."""
        with ThreadPoolExecutor(16) as pool:
            waiting = [pool.submit(self.ask, messages, longest, 0.01, **more) for messages, longest, more in jobs]
            return [one.result()[0][0] for one in waiting]


def serving(python: str, **more) -> Serving:
    return Serving(engine="vllm", engine_python=python, port=0, room=ROOM, cpus_per_replica=1, **more)


@pytest.mark.parametrize("family", ["owl1", "owl2"])
def test_answers_are_those_of_generate(cluster, python, processor, tmp_path, family):
    """And the same alone and in a batch; adapters are PEFT's own model; a client may leave."""
    owl, ours = wide_random(family, processor, WIDTH)
    folder = str(tmp_path / "model")
    owl.save_pretrained(folder)
    ours.save_pretrained(folder)
    held = [png(seed) for seed in range(6)]
    jobs = [(n, [held[(n + k) % 6] for k in range(n % 5)], 4 + n % 9) for n in range(COUNT)]
    wanted = [expected(owl, ours, *job) for job in jobs]
    torch.manual_seed(1)
    doubled = r"v_proj\.multiway\.[01]" if family == "owl2" else "v_proj"
    targets = rf"model\.language_model\..*\.(q_proj|down_proj|{doubled})"
    adapted = get_peft_model(owl, LoraConfig(r=8, lora_alpha=128, target_modules=targets))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapted.save_pretrained(tmp_path / "adapters/other")
    of_adapter = [expected(adapted, ours, *job) for job in jobs[:12]]
    assert of_adapter != wanted[:12]

    with running(folder, serving(python, adapters=str(tmp_path / "adapters")), KEY) as address:
        endpoint = Endpoint(address)
        made = endpoint.together([(asked(n, shown_), longest, {}) for n, shown_, longest in jobs])
        assert sum(one == two for one, two in zip(made, wanted, strict=True)) == COUNT
        both = [
            (asked(n, shown_), longest, {"model": name})
            for n, shown_, longest in jobs[:12]
            for name in ("owl", "other")
        ]
        mixed = endpoint.together(both)
        assert mixed[0::2] == wanted[:12]
        assert mixed[1::2] == of_adapter

        chosen = {"temperature": 1.2, "seed": 7, "top_p": 0.9, "frequency_penalty": 0.5, "n": 3}
        alone, said = endpoint.ask(asked(3, [held[1]]), 12, logprobs=True, top_logprobs=3, **chosen)
        crowd = [(asked(n, []), 16, {"temperature": 1.5, "seed": n}) for n in range(6)]
        assert endpoint.together([(asked(3, [held[1]]), 12, chosen), *crowd])[0] == alone[0]
        assert len({tuple(tokens) for tokens in alone}) > 1
        for entry in said.choices[0].logprobs.content:
            assert len(entry.top_logprobs) == 3
            assert entry.logprob <= entry.top_logprobs[0].logprob + 1e-6

        _, said = endpoint.ask(asked(0, [held[0]]), 4, extra_body={"looked": True})
        assert said.model_extra["owl"]["looked"] is None
        assert "does not tell" in said.model_extra["owl"]["not_looked"]
        body = {"model": "owl", "messages": asked(0, []), "max_tokens": 400, "ignore_eos": True}
        headers = {"authorization": f"Bearer {SECRET}"}
        with pytest.raises(requests.ReadTimeout):
            requests.post(f"{address}/v1/chat/completions", json=body, headers=headers, timeout=0.3)
        assert endpoint.ask(asked(*jobs[1][:2]), jobs[1][2])[0] == [wanted[1]]


def test_an_answer_keeps_to_a_json_schema(cluster, python, shared, tmp_path):
    form = {"type": "json_schema", "json_schema": {"name": "animals", "schema": ANIMALS}}
    with running(lettered(tmp_path, shared, WIDTH), serving(python), KEY) as address:
        endpoint = Endpoint(address)
        for seed in range(3):
            _, said = endpoint.ask(shown(png(seed)), 80, temperature=1.0, seed=seed, response_format=form)
            assert_animals(said.choices[0].message.content)
