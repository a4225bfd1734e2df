"""Real endpoints, asked by the real client: in one process, and on Ray Serve."""

from __future__ import annotations

import copy
import json
import socket
import time

import openai
import pytest
import requests
import torch
from endpoint import ANIMALS, Slow, alone, assert_animals, lettered, png, shown
from peft import LoraConfig, get_peft_model

from jobs.replay import replay
from owl_model.answering import answer
from pipelines.serving.batch import answer_file
from pipelines.serving.deploy import deploy
from pipelines.serving.keys import Budgets, Key, add_key, hashed, new_key, read_keys
from pipelines.serving.options import Room, Serving
from pipelines.serving.serve import free_port, running
from pipelines.serving.writing import Writer, bytes_of
from pipelines.settings import OwlError

SECRET, KEY = new_key("tester")
ROOM = Room(tokens=8192, page=16, requests=8, queue=8, pictures=16)
ALONE = Serving(room=ROOM)


def client_of(address: str, secret: str = SECRET) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=secret, max_retries=0)


@pytest.fixture(scope="module", params=["alone", "serve"])
def address(request, cluster, model_folder):
    if request.param == "alone":
        with alone(model_folder, ALONE, {KEY.sha256: KEY}) as (address, _):
            yield address
    else:
        settings = ALONE.model_copy(update={"port": 0, "cpus_per_replica": 0.5})
        with running(model_folder, settings, KEY) as address:
            yield address


@pytest.fixture(scope="module")
def client(address):
    return client_of(address)


@pytest.fixture(scope="module")
def picture(world) -> bytes:
    return sorted((world / "heldout/pictures").iterdir())[0].read_bytes()


def asked(client, messages, **more):
    return client.chat.completions.create(
        **{"model": "owl", "messages": messages, "max_tokens": 8, "temperature": 0} | more
    )


def test_answer_equals_the_models_own(client, owl, processor, picture):
    served = asked(client, shown(picture))
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is the circle ?"}]}
    ]
    assert (
        served.choices[0].message.content.strip()
        == answer(owl, processor, [messages], [[picture]], max_new_tokens=8)[0]
    )
    assert served.usage.total_tokens == served.usage.prompt_tokens + served.usage.completion_tokens
    assert served.usage.completion_tokens <= 8


def test_streaming_gives_the_same_text_and_usage(client, picture):
    whole = asked(client, shown(picture))
    pieces = list(asked(client, shown(picture), stream=True, stream_options={"include_usage": True}))
    text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert text == whole.choices[0].message.content
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == whole.choices[0].finish_reason
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_several_choices_are_those_of_their_seeds_and_repeat(client, picture):
    several = asked(client, shown(picture), n=3, seed=5, temperature=1.5)
    alone = [asked(client, shown(picture), seed=5 + k, temperature=1.5) for k in range(3)]
    assert [c.message.content for c in several.choices] == [one.choices[0].message.content for one in alone]
    assert [c.index for c in several.choices] == [0, 1, 2]
    pieces = list(asked(client, shown(picture), n=3, seed=5, temperature=1.5, stream=True))
    texts = ["", "", ""]
    for piece in pieces:
        for choice in piece.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [c.message.content for c in several.choices]


def test_logprobs_are_those_of_the_tokens(client, picture):
    said = asked(client, shown(picture), logprobs=True, top_logprobs=3)
    entries = said.choices[0].logprobs.content
    assert len(entries) >= said.usage.completion_tokens - 1  # all but the token that closes the answer
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)  # greedy takes the likeliest
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token
    plain = client.completions.create(model="owl", prompt="a red circle", max_tokens=4, temperature=0, logprobs=2)
    assert len(plain.choices[0].logprobs.token_logprobs) == len(plain.choices[0].logprobs.tokens) >= 3


def test_completions_of_several_prompts(client):
    texts = ["a red circle", "a blue square"]
    together = client.completions.create(model="owl", prompt=texts, max_tokens=4, temperature=0)
    alone = [client.completions.create(model="owl", prompt=text, max_tokens=4, temperature=0) for text in texts]
    assert [choice.text for choice in together.choices] == [one.choices[0].text for one in alone]


def test_stop_strings_cut_the_answer(client, picture):
    whole = asked(client, shown(picture), temperature=1.5, seed=3, max_tokens=12, extra_body={"ignore_eos": True})
    words = whole.choices[0].message.content.split()
    stop = words[2]
    cut = asked(
        client, shown(picture), temperature=1.5, seed=3, max_tokens=12, stop=stop, extra_body={"ignore_eos": True}
    )
    said = whole.choices[0].message.content
    assert cut.choices[0].message.content == said[: said.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_models_and_tokens(client, address, processor):
    assert [model.id for model in client.models.list()] == ["owl"]
    assert client.models.retrieve("owl").id == "owl"
    headers = {"authorization": f"Bearer {SECRET}"}
    body = {"model": "owl", "messages": [{"role": "user", "content": "a circle"}]}
    found = requests.post(f"{address}/tokenize", json=body, headers=headers).json()
    assert found["tokens"] == processor.encode(body["messages"], prompt=True).ids
    assert found["count"] == len(found["tokens"])


def test_an_upload_is_answered_like_the_picture_itself(client, address, picture):
    kept = client.files.create(file=("picture.png", picture), purpose="vision")
    assert client.files.create(file=("other.png", picture), purpose="vision").id == kept.id
    by_name = [
        {"type": "image_url", "image_url": {"url": kept.id}},
        {"type": "text", "text": "what color is the circle ?"},
    ]
    first = asked(client, [{"role": "user", "content": by_name}])
    assert first.choices[0].message.content == asked(client, shown(picture)).choices[0].message.content
    assert requests.get(f"{address}/v1/files/{kept.id}", headers={"authorization": f"Bearer {SECRET}"}).json()[
        "bytes"
    ] == len(picture)
    by_name[0]["image_url"]["url"] = "file-" + "0" * 64
    with pytest.raises(openai.NotFoundError, match="no such upload"):
        asked(client, [{"role": "user", "content": by_name}])


def test_the_second_question_about_a_picture_comes_from_the_cache(client):
    data = png(1234)
    text = "a red circle and a blue square and a large green triangle " * 12
    first = asked(client, shown(data, text=text))
    second = asked(client, shown(data, text=text))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 0.85 * second.usage.prompt_tokens
    salted = asked(client, shown(data, text=text), extra_body={"cache_salt": "mine"})
    assert salted.usage.prompt_tokens_details.cached_tokens == 0
    assert first.choices[0].message.content == salted.choices[0].message.content


@pytest.mark.parametrize(
    ("change", "status", "names"),
    [
        ({"model": "gpt"}, 404, "there is no model 'gpt'"),
        ({"temperature": 3}, 400, "temperature"),
        ({"extra_body": {"logit_bias": {}}}, 400, "logit_bias"),
        ({"extra_body": {"top_k": "many"}}, 400, "top_k"),
        ({"n": 17}, 400, "n: "),
        ({"messages": []}, 400, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 3}}]}]},
            400,
            "messages.0.content.0",
        ),
        ({"messages": [{"role": "robot", "content": "hello"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, 400, "more than the model can hold"),
        ({"stop": ["a"] * 5}, 400, "stop"),
    ],
)
def test_refusals_name_the_field(client, picture, change, status, names):
    with pytest.raises(openai.APIStatusError) as caught:
        asked(client, **{"messages": shown(picture)} | change)
    assert caught.value.status_code == status
    assert names in str(caught.value)
    assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_nothing_but_health_and_the_page_answers_without_a_key(address):
    for path in ("/v1/models", "/ready", "/metrics", "/openapi.json", "/docs", "/nowhere", "/v1/files/x"):
        assert requests.get(address + path).status_code == 401, path
        assert requests.get(address + path, headers={"authorization": "Bearer sk-wrong"}).status_code == 401
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/files"):
        refused = requests.post(address + path, json={})
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
    assert requests.get(f"{address}/health").json() == {"status": "ok"}
    assert requests.get(f"{address}/").status_code == 200
    headers = {"authorization": f"Bearer {SECRET}"}
    assert requests.get(f"{address}/ready", headers=headers).status_code == 200
    assert requests.get(f"{address}/nowhere", headers=headers).json()["error"]["message"] == "there is no such route"
    assert requests.put(f"{address}/v1/models", headers=headers).status_code == 405


def test_metrics_count_by_model_and_key(request, client, address, picture):
    asked(client, shown(picture))
    page = requests.get(f"{address}/metrics", headers={"authorization": f"Bearer {SECRET}"}).text
    lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    key = 'key="tester",model_name="owl"'
    assert float(lines[f"owl:time_to_first_token_seconds_count{{{key}}}"]) >= 1
    assert float(lines[f"owl:generation_tokens_total{{{key}}}"]) >= 1
    beside = request.node.callspec.params["address"] == "alone"  # Serve's engine replicas tell Ray's exporter
    assert any(line.startswith("owl:kv_cache_usage_perc") for line in lines) == beside


def test_a_request_keeps_its_id(address):
    found = requests.get(f"{address}/health", headers={"x-request-id": "abc-1"})
    assert found.headers["x-request-id"] == "abc-1"


def test_a_receipt_holds_what_was_asked_and_said(client, picture):
    said = asked(client, shown(picture), temperature=1.0, extra_body={"receipt": True})
    receipt = said.model_extra["owl"]["receipt"]
    (choice,) = receipt["choices"]
    assert len(choice["token_ids"]) == said.usage.completion_tokens
    assert len(choice["prompt_token_ids"]) == said.usage.prompt_tokens
    assert len(choice["pictures"]) == 1
    again = asked(client, shown(picture), temperature=1.0, seed=choice["sampling"]["seed"])
    assert again.choices[0].message.content == said.choices[0].message.content


def test_budgets_fill_within_a_minute():
    key = Key(name="k", sha256="0" * 64, requests_a_minute=2, tokens_a_minute=100)
    budgets = Budgets()
    assert budgets.spend(key, {"requests": 1, "tokens": 60, "pictures": 99}, now=0) is None
    assert budgets.spend(key, {"requests": 1, "tokens": 60}, now=0) == ("tokens", pytest.approx(12))
    assert budgets.spend(key, {"requests": 1, "tokens": 101}, now=0) == ("tokens", float("inf"))
    assert budgets.spend(key, {"requests": 1, "tokens": 60}, now=12) is None
    assert budgets.spend(key, {"requests": 1, "tokens": 1}, now=12) == ("requests", pytest.approx(18))
    assert budgets.spend(key, {"tokens": -50}, now=12) is None
    assert budgets.spend(key, {"tokens": 50}, now=12) is None


def test_a_key_that_has_spent_its_budget_is_told_when_to_come_again(model_folder, picture):
    secret, key = new_key("small", requests_a_minute=2, pictures_a_minute=1)
    with alone(model_folder, ALONE, {key.sha256: key}) as (address, _):
        client = client_of(address, secret)
        with pytest.raises(openai.RateLimitError, match="this key may spend 1 a minute"):
            asked(client, shown(picture, picture))
        asked(client, shown(picture))
        with pytest.raises(openai.RateLimitError, match="pictures a minute") as caught:
            asked(client, shown(picture))
        assert 50 <= int(caught.value.response.headers["retry-after"]) <= 60
        asked(client, [{"role": "user", "content": "hello"}])
        with pytest.raises(openai.RateLimitError, match="requests a minute"):
            asked(client, [{"role": "user", "content": "hello"}])


def until(true, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def test_a_full_engine_refuses_at_once(model_folder):
    settings = ALONE.model_copy(update={"room": ROOM.model_copy(update={"requests": 1, "queue": 0})})
    with alone(model_folder, settings) as (address, engine):
        client = client_of(address)
        engine.asked += 1  # as if another were being answered
        with pytest.raises(openai.InternalServerError, match="no more are taken") as caught:
            asked(client, shown(png(0)))
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "1"
        engine.asked -= 1
        assert asked(client, shown(png(0))).choices[0].finish_reason


def slow(processor, seconds: float = 0.05, deaths: tuple[int, ...] = ()):
    word = processor.encode([{"role": "user", "content": "circle"}], prompt=True).ids[-3]
    return lambda: Slow(word, seconds, deaths)


HELLO = {"model": "owl", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 120}


def test_who_leaves_frees_the_place(model_folder, processor):
    with alone(model_folder, ALONE, engine=slow(processor, 0.2)) as (address, engine):
        with requests.post(f"{address}/v1/chat/completions", json=HELLO | {"stream": True}, stream=True) as reply:
            lines = reply.iter_lines(chunk_size=1)  # kept: a generator that is let go closes the connection
            next(lines)
            assert engine.asked == 1
        until(lambda: not engine.asked)
        engine.seconds = 60  # none of these two has its first word
        for more in ({}, {"stream": True}):
            with pytest.raises(requests.ReadTimeout):
                requests.post(f"{address}/v1/chat/completions", json=HELLO | more, timeout=0.3)
            until(lambda: not engine.asked)
        odd = requests.get(f"{address}/health", headers={"x-request-id": "no good"})
        assert len(odd.headers["x-request-id"]) == 32


def test_time_is_up_where_an_answer_takes_too_long(model_folder, processor):
    settings = ALONE.model_copy(update={"seconds": 0.3})
    with alone(model_folder, settings, engine=slow(processor)) as (address, engine):
        with pytest.raises(openai.APIStatusError, match="no whole answer within") as caught:
            client_of(address).chat.completions.create(**HELLO)
        assert caught.value.status_code == 504
        until(lambda: not engine.asked)


def test_an_engine_that_dies_is_replaced_before_the_first_word_and_told_of_after_it(model_folder, processor):
    made = slow(processor, 0.01, deaths=(0, 0))
    with alone(model_folder, ALONE, engine=made) as (address, _):
        client = client_of(address)
        assert client.chat.completions.create(**HELLO | {"max_tokens": 5}).usage.completion_tokens == 5
    with alone(model_folder, ALONE, engine=slow(processor, 0.01, deaths=(0, 0, 0, 3))) as (address, _):
        client = client_of(address)
        with pytest.raises(openai.InternalServerError, match="went away"):
            client.chat.completions.create(**HELLO)
        pieces = []
        with pytest.raises(openai.APIError, match="went away"):
            pieces.extend(client.chat.completions.create(**HELLO, stream=True))
        streamed = client.chat.completions.create(**HELLO | {"max_tokens": 5}, stream=True)
        assert len([1 for piece in streamed if piece.choices[0].delta.content]) == 5


def test_answers_that_keep_to_a_schema(shared, tmp_path):
    with alone(lettered(tmp_path, shared), ALONE) as (address, _):
        client = client_of(address)
        for seed in range(3):
            said = asked(
                client,
                shown(png(seed)),
                temperature=1.0,
                seed=seed,
                max_tokens=80,
                response_format={"type": "json_schema", "json_schema": {"name": "animals", "schema": ANIMALS}},
            )
            assert_animals(said.choices[0].message.content)
        wrong = {"name": "wrong", "schema": {"type": "nonsense"}}
        with pytest.raises(openai.BadRequestError, match="cannot be held to"):
            asked(client, shown(png(0)), response_format={"type": "json_schema", "json_schema": wrong})


def test_words_come_whole_and_stop_across_pieces(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "data/weights/tinystories-llama/stories260K")
    ids = tokenizer("Once é two three", add_special_tokens=False)["input_ids"]
    writer = Writer(tokenizer, ["two"])
    written = [writer.write([token], []) for token in ids]
    stopped = next(k for k, one in enumerate(written) if one.stopped)
    assert "".join(one.text for one in written[: stopped + 1]) == "Once é "
    assert not any(one.stopped for one in written[:stopped])
    assert (
        b"".join(bytes_of(tokenizer.convert_ids_to_tokens(token), False) for token in ids).decode().strip()
        == "Once é two three"
    )


def test_keys_are_kept_as_hashes(tmp_path):
    path = str(tmp_path / "keys.jsonl")
    secret = add_key(path, "one", tokens_a_minute=10)
    assert secret not in (tmp_path / "keys.jsonl").read_text()
    assert read_keys(path)[hashed(secret)].tokens_a_minute == 10
    with pytest.raises(OwlError, match="has a key called 'one' already"):
        add_key(path, "one")
    (tmp_path / "keys.jsonl").write_text('{"name": "two", "sha256": "abc"}\n')
    with pytest.raises(OwlError, match="line 1: sha256"):
        read_keys(path)
    with pytest.raises(OwlError, match="there is no file of keys"):
        read_keys(f"{path}.not")


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({"engine": "vllm", "room": {"compile": True}}, "room.compile"),
        ({"keys": "k", "no_keys": True}, "exclude"),
        ({"min_replicas": 2}, "min_replicas"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(more, names):
    with pytest.raises(ValueError, match=names):
        Serving(**more)


def test_a_taken_port_is_refused_by_its_number():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OwlError, match=f"cannot listen on 127.0.0.1:{port}"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", 0) > 0


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("applications: [{name: owl, import_path: a, route_prefxi: /}]", "there is no 'route_prefxi'"),
        ("http_options: {hots: x}\napplications: []", "there is no 'hots'"),
        (
            "applications: [{name: owl, import_path: a, args: {model: m, serving: {min_replica: 1}}}]",
            "serving.min_replica",
        ),
        ("[]", "a mapping"),
    ],
)
def test_a_misspelt_config_file_is_refused_by_name(tmp_path, text, names):
    (tmp_path / "serve.yaml").write_text(text)
    with pytest.raises(OwlError, match=names):
        deploy(str(tmp_path / "serve.yaml"))


def test_where_an_answer_looked_is_told_for_each_picture(client):
    said = asked(client, shown(png(0), png(1)), extra_body={"looked": True})
    maps = said.model_extra["owl"]["looked"]
    assert len(maps) == 2
    for grid in maps:
        assert len(grid) == len(grid[0])
        assert sum(map(sum, grid)) == pytest.approx(1, abs=1e-2)
    streamed = list(asked(client, shown(png(0), png(1)), stream=True, extra_body={"looked": True}))
    assert streamed[-1].model_extra["owl"]["looked"] == maps


def test_a_receipt_is_replayed_and_an_adapter_is_asked_for_by_name(owl, model_folder, tmp_path):
    torch.manual_seed(0)
    targets = r"model\.language_model\..*\.(q_proj|down_proj)"
    adapted = get_peft_model(copy.deepcopy(owl), LoraConfig(r=4, lora_alpha=64, target_modules=targets))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapted.save_pretrained(tmp_path / "adapters/other")
    (tmp_path / "a.png").write_bytes(png(0))
    settings = ALONE.model_copy(update={"adapters": str(tmp_path / "adapters")})
    said = {}
    with alone(model_folder, settings) as (address, _):
        client = client_of(address)
        assert [model.id for model in client.models.list()] == ["owl", "other"]
        for name in ("owl", "other"):
            more = {"receipt": True, "ignore_eos": True}
            answer = asked(client, shown(png(0)), model=name, temperature=1.0, seed=4, n=2, extra_body=more)
            (tmp_path / f"{name}.json").write_text(answer.to_json())
            said[name] = [choice.message.content for choice in answer.choices]
    assert said["owl"] != said["other"]
    folder = str(tmp_path / "adapters/other")
    for name, adapter in (("owl", ""), ("other", folder)):
        again = replay(tmp_path / f"{name}.json", model_folder, [tmp_path / "a.png"], adapter)
        assert all(answer["same"] for answer in again)
        assert [answer["text"].strip() for answer in again] == [text.strip() for text in said[name]]
    with pytest.raises(OwlError, match="of another adapter"):
        replay(tmp_path / "owl.json", model_folder, [tmp_path / "a.png"], folder)
    with pytest.raises(OwlError, match="1 of the receipt's pictures"):
        replay(tmp_path / "owl.json", model_folder, [])


@pytest.mark.parametrize("address", ["alone"], indirect=True)
def test_a_file_of_requests_is_answered_as_the_endpoint_would(cluster, client, model_folder, picture, tmp_path):
    body = {"model": "owl", "messages": shown(picture), "max_tokens": 8, "temperature": 0}
    lines = [{"custom_id": f"n{k}", "method": "POST", "url": "/v1/chat/completions", "body": body} for k in range(3)]
    lines.append({**lines[0], "custom_id": "other", "body": body | {"model": "gpt"}})
    lines.append({**lines[0], "custom_id": "odd", "body": body | {"temperature": 3}})
    written = "\n".join([*map(json.dumps, lines), "no JSON"])
    (tmp_path / "in.jsonl").write_text(written)
    counts = answer_file(f"{tmp_path}/in.jsonl", f"{tmp_path}/out.jsonl", model_folder, ALONE)
    assert counts == {"200": 3, "404": 1, "400": 2}
    told = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["custom_id"] for row in told] == ["n0", "n1", "n2", "other", "odd", None]
    wanted = asked(client, shown(picture)).choices[0].message.content
    for row in told[:3]:
        assert row["response"]["body"]["choices"][0]["message"]["content"] == wanted
    assert told[4]["response"]["body"]["error"]["param"] == "temperature"
