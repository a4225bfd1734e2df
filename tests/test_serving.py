"""A real endpoint, asked by the real client."""

from __future__ import annotations

import asyncio
import base64
import socket

import openai
import pytest

from owl_model.answering import answer
from pipelines.serving.media import MediaError, read_data_uri
from pipelines.serving.serve import Serving, free_port, running, until_stop
from pipelines.settings import OwlError


@pytest.fixture(scope="module")
def client(cluster, model_folder):
    with running(model_folder, Serving(port=0, cpus_per_replica=0.5)) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def picture(world) -> bytes:
    return sorted((world / "heldout/pictures").iterdir())[0].read_bytes()


def question(picture: bytes) -> list[dict]:
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [image, {"type": "text", "text": "what color is the circle ?"}]}]


def test_answer_equals_the_models_own(client, owl, processor, picture):
    served = client.chat.completions.create(model="owl", messages=question(picture), max_tokens=8)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is the circle ?"}]}
    ]
    assert served.choices[0].message.content == answer(owl, processor, [messages], [[picture]], max_new_tokens=8)[0]
    assert served.usage.total_tokens == served.usage.prompt_tokens + served.usage.completion_tokens
    assert served.usage.completion_tokens <= 8


def test_streaming_gives_the_same_text_and_usage(client, picture):
    whole = client.chat.completions.create(model="owl", messages=question(picture), max_tokens=8)
    pieces = list(
        client.chat.completions.create(
            model="owl",
            messages=question(picture),
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert text.strip() == whole.choices[0].message.content
    assert pieces[-1].usage == whole.usage


def test_a_taken_port_is_refused_by_its_number():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OwlError, match=f"cannot listen on 127.0.0.1:{port}"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", 0) > 0


def test_models(client):
    assert [model.id for model in client.models.list()] == ["owl"]


@pytest.mark.parametrize(
    ("change", "status", "names"),
    [
        ({"model": "gpt"}, 404, "there is no model 'gpt'"),
        ({"temperature": 3}, 400, "temperature"),
        ({"extra_body": {"logit_bias": {}}}, 400, "logit_bias"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, 400, "more than the model can hold"),
    ],
)
def test_refusals_name_the_field(client, picture, change, status, names):
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{"model": "owl", "messages": question(picture), "max_tokens": 4, **change})
    assert caught.value.status_code == status
    assert names in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/x.png", "file:///etc/passwd", "data:image/png;base64,!!!", "data:image/png;base64,aGVsbG8="],
)
def test_only_decodable_data_uris_are_taken(url):
    with pytest.raises(MediaError):
        read_data_uri(url)


def test_stop_strings_cut_across_pieces():
    async def pieces():
        for text in ("one t", "w", "o three"):
            yield {"text": text}
        yield {"usage": {}, "finish": "length"}

    async def collect():
        return [piece async for piece in until_stop(pieces(), ["two"])]

    out = asyncio.run(collect())
    assert "".join(piece.get("text", "") for piece in out) == "one "
    assert out[-1]["finish"] == "stop"
