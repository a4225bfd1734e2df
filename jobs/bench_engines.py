"""How fast answers are written, by Owl's endpoint and by what one could take instead, at one shape and in one run.

Servers are asked over HTTP, as a client would; transformers' own ways run in a process without one. Each rival lives in
a process of its own for the whole run, and they take turns, so that what else the machine does hits all alike. A turn:
so many clients ask at once, by token ids, each with another prompt, and want so many tokens, to the last.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import requests

from pipelines.settings import OwlError

VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8}
VOCABULARY, QUERIES, END = 32_000, 63, 2
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}


class Told(NamedTuple):
    """Of one client: seconds to the first token, and to each later one. A way that streams nothing tells none."""

    first: float
    each: float


def write_model(folder: str) -> None:
    """Random weights: a decoder of 12 × 512 and 64 visual tokens a picture, with a word for every id; unless it is
    there."""
    if Path(folder, "config.json").exists():
        return
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from owl_model import OwlAbstractorConfig, OwlConfig, OwlForConditionalGeneration, OwlProcessor, OwlVisionConfig
    from owl_model.processing import OwlImageProcessor

    torch.manual_seed(0)
    config = OwlConfig(
        vision_config=OwlVisionConfig(**VISION, image_size=112, patch_size=14),
        abstractor_config=OwlAbstractorConfig(**VISION, encoder_hidden_size=256, num_queries=QUERIES),
        text_config=LlamaConfig(**TEXT, vocab_size=VOCABULARY, max_position_embeddings=4096),
    )
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary())}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    OwlForConditionalGeneration(config).eval().save_pretrained(folder)
    OwlProcessor.for_model(config, OwlImageProcessor(112), tokenizer, "plain").save_pretrained(folder)


def vocabulary() -> list[str]:
    return ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, VOCABULARY))]


def prompts_of(clients: int, context: int, turn: int) -> list[list[int]]:
    """Others each turn, so that nothing comes from a cache."""
    draw = random.Random(1000 * turn + clients)
    return [[draw.randrange(10, VOCABULARY - 10) for _ in range(context)] for _ in range(clients)]


# --- servers ---------------------------------------------------------------------------------------------------------


class Server:
    """An OpenAI-compatible server under a command, which is told a port."""

    def __init__(self, name: str, command: Sequence[str]):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.name, self.url = name, f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [part.replace("PORT", str(port)) for part in command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def wait(self, seconds: float = 900) -> None:
        """Raises OwlError where it does not come up."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.2)
        raise OwlError(f"{self.name} does not come up")

    def turn(self, prompts: list[list[int]], new: int) -> tuple[float, list[Told]]:
        return asyncio.run(self.all_of(prompts, new))

    async def all_of(self, prompts: list[list[int]], new: int) -> tuple[float, list[Told]]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            began = time.monotonic()
            told = await asyncio.gather(*(self.ask(session, ids, new) for ids in prompts))
            return time.monotonic() - began, list(told)

    async def ask(self, session: aiohttp.ClientSession, ids: list[int], new: int) -> Told:
        body = {"model": "owl", "prompt": ids, "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        began, first, last, made = time.monotonic(), 0.0, 0.0, 0
        async with session.post(f"{self.url}/v1/completions", json=body) as reply:
            if reply.status != 200:
                raise OwlError(f"{self.name}: {(await reply.text())[:300]}")
            async for line in reply.content:
                if not line.startswith(b"data: {"):
                    continue
                said = json.loads(line[6:])
                if said.get("usage"):
                    made = said["usage"]["completion_tokens"]
                if said["choices"]:
                    last = time.monotonic()
                    first = first or last
        if made != new:
            raise OwlError(f"{self.name} made {made} tokens of {new}")
        return Told(first - began, (last - first) / (new - 1))

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def owl(python: str, folder: str, precision: str, clients: int, tokens: int, *more: str) -> list[str]:
    settings = {
        "no_keys": "true",
        "precision": precision,
        "room.requests": str(clients),
        "room.tokens": str(tokens),
        **dict(one.split("=") for one in more),
    }
    sets = [part for name, value in settings.items() for part in ("--set", f"serving.{name}={value}")]
    return [str(Path(python).parent / "owl"), "serve", folder, "--alone", "--port", "PORT", *sets]


def vllms_own(python: str, folder: str, precision: str, clients: int, tokens: int) -> list[str]:
    shape = {"max-model-len": 4096, "max-num-seqs": clients, "dtype": PRECISIONS[precision]}
    shape |= {"kv-cache-memory-bytes": 2 * 12 * 512 * (2 if precision == "bf16" else 4) * max(tokens, 4096)}
    options = [part for name, value in shape.items() for part in (f"--{name}", str(value))]
    started = [python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", "PORT"]
    return [*started, "--model", folder, "--served-model-name", "owl", *options]


def llama(server: str, weights: str, clients: int, tokens: int) -> list[str]:
    shape = ["-np", str(clients), "-c", str(tokens), "-t", "2", "-kvu"]
    return [server, "-m", weights, "--host", "127.0.0.1", "--port", "PORT", *shape]


# --- transformers, in processes without a server ---------------------------------------------------------------------


class Child:
    """`Generate` or `Stock` in a process of its own: this module, started with its name."""

    def __init__(self, name: str, folder: str, precision: str, tokens: int):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs.bench_engines", name, folder, precision, str(tokens)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def wait(self) -> None: ...

    def turn(self, prompts: list[list[int]], new: int) -> tuple[float, list[Told]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"prompts": prompts, "new": new}) + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline()), []

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(60)


class Generate:
    """`generate`, of all prompts at once (a perfect static batch: all of one length, and all answers) or of one after
    another."""

    def __init__(self, owl: Any, together: bool):
        self.owl, self.together = owl, together

    def turn(self, prompts: list[list[int]], new: int) -> float:
        import torch
        from transformers import GenerationConfig

        chosen = GenerationConfig(
            do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=new, min_new_tokens=new
        )
        batches = [prompts] if self.together else [[ids] for ids in prompts]
        began = time.monotonic()
        with torch.inference_mode():
            for batch in batches:
                ids = torch.tensor(batch)
                made = self.owl.generate(ids, attention_mask=torch.ones_like(ids), generation_config=chosen)
                assert made.shape[1] == ids.shape[1] + new
        return time.monotonic() - began


class Stock:
    """transformers' continuous batching as it comes, over the same decoder."""

    def __init__(self, owl: Any, tokens: int):
        self.owl, self.tokens, self.turns = owl, tokens, 0
        self.manager: Any = None

    def opened(self, new: int) -> Any:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        from pipelines.serving.batching import Decoder
        from pipelines.serving.virtual import PictureIds

        class Plain(Decoder):
            """With keys and values in the weights' own type, as transformers has them."""

            @property
            def dtype(self) -> Any:
                return self.lm_head.weight.dtype

        decoder = Plain(self.owl, PictureIds(self.owl.get_input_embeddings(), QUERIES + 1, 1)).eval()
        decoder.set_attn_implementation("sdpa")
        plain = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=new)
        settings = ContinuousBatchingConfig(page_size=32, num_blocks=self.tokens // 32, use_async_batching=False)
        manager = decoder.init_continuous_batching(generation_config=plain, continuous_batching_config=settings)
        manager.start()
        return manager

    def turn(self, prompts: list[list[int]], new: int) -> float:
        self.manager = self.manager or self.opened(new)
        self.turns += 1
        began = time.monotonic()
        for number, ids in enumerate(prompts):
            self.manager.add_request(ids, request_id=f"{self.turns}-{number}", max_new_tokens=new)
        done = 0
        while done < len(prompts):
            result = self.manager.get_result(timeout=1)
            assert result is None or not result.error, result.error
            done += result is not None
        return time.monotonic() - began


def work(name: str, folder: str, precision: str, tokens: int) -> None:
    """Takes turns as they come on stdin."""
    import torch

    from owl_model import OwlForConditionalGeneration
    from pipelines.serving.batching import aside

    dtype = getattr(torch, PRECISIONS[precision])
    model = aside(lambda: OwlForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval())
    rival: Any = Stock(model, tokens) if name == "stock" else Generate(model, together=name == "static")
    for line in sys.stdin:
        asked = json.loads(line)
        print(rival.turn(asked["prompts"], asked["new"]), flush=True)


# --- all of them -----------------------------------------------------------------------------------------------------


def rivals(folder: str, precision: str, clients: int, tokens: int, vllm: str, llama_server: str) -> dict[str, Any]:
    """Those that are there; ``vllm`` is the Python of its environment, ``llama_server`` llama.cpp's program."""
    shape = (folder, precision, clients, tokens)
    servers = {
        "owl": owl(sys.executable, *shape),
        "owl, compiled": owl(sys.executable, *shape, "room.compile=true"),
    }
    if vllm:
        servers["owl with vLLM"] = owl(vllm, *shape, "engine=vllm")
        servers["vLLM's own server"] = vllms_own(vllm, *shape)
    if llama_server:
        weights = f"{folder}/{precision}.gguf"
        write_gguf(folder, weights, precision)
        servers["llama.cpp's server"] = llama(llama_server, weights, clients, tokens)
    return {name: Server(name, command) for name, command in servers.items()} | {
        "transformers' generate, one by one": Child("generate", folder, precision, tokens),
        "transformers' generate, a static batch": Child("static", folder, precision, tokens),
        "transformers' continuous batching": Child("stock", folder, precision, tokens),
    }


def write_gguf(folder: str, path: str, precision: str) -> None:
    """The language model alone, for llama.cpp. Its rotary embedding turns neighbouring pairs, so rows of queries and
    keys are put in that order, as its own converter does."""
    import gguf
    import torch
    from safetensors.torch import load_file

    weights = {
        name.removeprefix("model.language_model."): value
        for name, value in load_file(f"{folder}/model.safetensors").items()
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(TEXT["hidden_size"])
    writer.add_block_count(TEXT["num_hidden_layers"])
    writer.add_feed_forward_length(TEXT["intermediate_size"])
    writer.add_head_count(TEXT["num_attention_heads"])
    writer.add_head_count_kv(TEXT["num_attention_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(vocabulary())
    writer.add_token_scores([0.0] * VOCABULARY)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.NORMAL] * (VOCABULARY - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(END)
    names = {"embed_tokens.weight": "token_embd", "norm.weight": "output_norm", "lm_head.weight": "output"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(TEXT["num_hidden_layers"]):
        names |= {f"layers.{layer}.{ours}.weight": f"blk.{layer}.{theirs}" for ours, theirs in parts.items()}
    for ours, theirs in names.items():
        value = weights[ours].float()
        if theirs.endswith(("attn_q", "attn_k")):
            heads = TEXT["num_attention_heads"]
            value = value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        if value.ndim == 1 or precision == "fp32":
            writer.add_tensor(f"{theirs}.weight", value.numpy())
        else:
            raw = value.bfloat16().view(torch.uint8).numpy()
            writer.add_tensor(f"{theirs}.weight", raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(
    folder: str,
    precision: str,
    clients: Sequence[int],
    contexts: Sequence[int],
    new: int,
    repeats: int,
    vllm: str = "",
    llama_server: str = "",
) -> Iterator[dict[str, Any]]:
    """Tokens a second of each, over prompts and answers together, in the median over turns."""
    write_model(folder)
    most = max(clients)
    tokens = max(16_384, 2 * most * (max(contexts) + new))
    found = rivals(folder, precision, most, tokens, vllm, llama_server)
    try:
        for rival in found.values():
            rival.wait()
        for context in contexts:
            for count in clients:
                yield from taken_in_turns(found, precision, count, context, new, repeats)
    finally:
        for rival in found.values():
            rival.end()


def taken_in_turns(
    found: dict[str, Any], precision: str, clients: int, context: int, new: int, repeats: int
) -> Iterator[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in found}
    told: dict[str, list[Told]] = {name: [] for name in found}
    for turn in range(repeats + 1):
        for name, rival in found.items():
            spent, each = rival.turn(prompts_of(clients, context, turn), new)
            if turn:  # the first warms up
                seconds[name].append(spent)
                told[name] += each
    ours = statistics.median(seconds["owl"])
    for name, turns in seconds.items():
        middle = statistics.median(turns)
        row: dict[str, Any] = {"engine": name, "precision": precision, "clients": clients, "context": context}
        row |= {"tokens a second": round(clients * new / middle, 1), "times owl's": round(ours / middle, 2)}
        if told[name]:
            row |= {"TTFT ms": spread([one.first for one in told[name]])}
            row |= {"TPOT ms": spread([one.each for one in told[name]])}
        yield row


def spread(seconds: list[float]) -> dict[str, float]:
    """p50 and p99, in milliseconds."""
    ordered = sorted(seconds)
    return {
        "p50": round(1000 * ordered[len(ordered) // 2], 2),
        "p99": round(1000 * ordered[int(0.99 * len(ordered))], 2),
    }


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
