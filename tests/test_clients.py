"""Other people's clients work unchanged: openai for Node, LangChain, curl, and schemathesis over every route."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import openai
import pytest
from endpoint import alone, png, uri

from pipelines.serving.keys import new_key
from pipelines.serving.options import Room, Serving

SECRET, KEY = new_key("clients")
HERE = Path(__file__).parent
INSTALLED = HERE.parent / ".clients"
needs_clients = pytest.mark.skipif(
    not (INSTALLED / "ready").exists(), reason="no other clients; `make clients` installs them"
)


@pytest.fixture(scope="module")
def address(model_folder):
    settings = Serving(room=Room(tokens=8192, requests=8, pictures=16))
    with alone(model_folder, settings, {KEY.sha256: KEY}) as (address, _):
        yield address


@pytest.fixture(scope="module")
def wanted(address) -> str:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=SECRET, max_retries=0)
    content = [{"type": "image_url", "image_url": {"url": uri(png(0))}}, {"type": "text", "text": "what color ?"}]
    asked = {"model": "owl", "messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
    return client.chat.completions.create(**asked).choices[0].message.content


def run(command: list, address: str) -> str:
    given = {"OWL_URL": address, "OWL_API_KEY": SECRET, "OWL_PICTURE": uri(png(0))}
    done = subprocess.run(command, env=os.environ | given, capture_output=True, text=True, cwd=INSTALLED.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@needs_clients
def test_openai_for_node(address, wanted):
    script = INSTALLED / "node/chat.mjs"
    script.write_text((HERE / "clients/chat.mjs").read_text())  # where its package is found
    found = json.loads(run(["node", str(script)], address))
    assert found["whole"] == found["streamed"] == wanted
    assert found["usage"] > 0
    assert found["refused"] == ["BadRequestError", 400, "temperature"]
    assert found["models"] == ["owl"]


@needs_clients
def test_langchain(address, wanted):
    found = json.loads(run([INSTALLED / "bin/python", HERE / "clients/chat_langchain.py"], address))
    assert found["whole"] == found["streamed"] == wanted
    assert found["batch"] == [wanted, wanted]
    assert found["usage"]["output_tokens"] > 0


def test_curl(address, wanted):
    content = [{"type": "image_url", "image_url": {"url": uri(png(0))}}, {"type": "text", "text": "what color ?"}]
    body = {"model": "owl", "messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
    asked = ["curl", "-sS", f"{address}/v1/chat/completions", "-H", f"authorization: Bearer {SECRET}"]
    asked += ["-H", "content-type: application/json", "-d", json.dumps(body)]
    assert json.loads(run(asked, address))["choices"][0]["message"]["content"] == wanted
    streamed = run([*asked[:-1], json.dumps(body | {"stream": True})], address)
    assert streamed.endswith("data: [DONE]\n\n")
    chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == wanted


@needs_clients
def test_schemathesis_finds_nothing(address):
    """Every route, by its own description: fitting and unfitting requests, each answered as described."""
    command = [
        INSTALLED / "bin/schemathesis",
        "--config-file",
        HERE / "clients/schemathesis.toml",
        "run",
        f"{address}/openapi.json",
        "--url",
        address,
    ]
    command += ["-H", f"Authorization: Bearer {SECRET}", "--max-examples", os.environ.get("OWL_EXAMPLES", "15")]
    command += ["--seed", "1", "--workers", "1", "--no-color"]
    run(command, address)
