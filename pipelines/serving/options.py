"""How a model is served: settings, which need not wait for torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipelines.settings import Settings


class Room(Settings):
    """What the built-in engine holds at once."""

    tokens: PositiveInt = 32_768
    """Keys and values of so many tokens, over all requests and what is kept of earlier ones."""
    page: PositiveInt = 16
    """Tokens of a page of the cache; a prompt's whole pages are found again."""
    batch_tokens: PositiveInt = 2048
    """Tokens of one step, prompts and answers together."""
    requests: PositiveInt = 16
    """Requests that are answered at once."""
    queue: NonNegativeInt = 64
    """Requests that may wait; more are refused at once."""
    pictures: PositiveInt = 256
    """Pictures whose embeddings are held."""
    compile: bool = False
    """Compiles the language model when the engine starts: on CPUs a minute and a half, and its weights twice in memory;
    then answers to short prompts are written 1.2 (sixteen at once) to 1.65 times (one) as fast in bf16, twice in fp32.
    On GPUs some minutes, for next tokens alone: 1.4 times as fast at 7 B."""


def longest_of(config: Any, room: Room) -> int:
    """Tokens that prompt and answer may have together, of a model's configuration."""
    return min(getattr(config.text_config, "max_position_embeddings", None) or 1 << 30, room.tokens)


class Media(Settings):
    """What pictures are taken, and from where."""

    hosts: list[str] = []
    """Hosts whose pictures are fetched, by https alone; a name that begins with a dot stands for all below it. Empty
    fetches nothing."""
    max_bytes: PositiveInt = 20_000_000
    """Of one encoded picture."""
    max_pictures: PositiveInt = 16
    """Of one request; the frames of videos count."""
    max_pixels: PositiveInt = 25_000_000
    """A picture's height times width."""
    seconds: PositiveFloat = 10
    """For a picture to come, and again to be decoded."""
    decoders: PositiveInt = 1
    """Processes that decode, for each gateway."""
    decoder_megabytes: PositiveInt = 768
    """Memory that each of them may take for its work."""
    kept_megabytes: PositiveInt = 256
    """Of decoded pictures that a gateway keeps, so that one that is asked about twice is decoded once."""
    upload_megabytes: PositiveInt = 512
    """Of uploaded pictures that are kept; those asked about longest ago go first."""
    embedding_megabytes: PositiveInt = 512
    """Of pictures' embeddings that engines share."""


class Serving(Settings):
    """How a model is served."""

    name: str = Field(default="owl", pattern="^[A-Za-z0-9][A-Za-z0-9._:-]*$")
    """The model's name in requests."""
    host: str = "127.0.0.1"
    """Address to listen on; other machines reach it only if you change this."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    keys: str = ""
    """File of API keys (`owl keys add`). Empty makes one key for as long as the endpoint runs."""
    no_keys: bool = False
    """Answers anyone, without a key."""
    engine: Literal["builtin", "vllm"] = "builtin"
    """What computes: the built-in engine, or vLLM, which is installed apart (docs/serving.md)."""
    engine_python: str = ""
    """Python of the environment that engine replicas run in, on Ray Serve; empty is the cluster's own."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the weights. bf16 is faster and takes half the memory; its answers may differ in their last bits from batch
    to batch."""
    room: Room = Room()
    """What a replica's engine holds at once."""
    media: Media = Media()
    """What pictures are taken, and from where."""
    adapters: str = ""
    """Folder of LoRA adapters, each in a folder of its own, by whose name requests ask for it as their model."""
    longest: PositiveInt = 1024
    """Tokens of an answer where the request does not say."""
    seconds: PositiveFloat = 600
    """For a request, from its arrival to its end."""
    max_body_bytes: PositiveInt = 64_000_000
    """Of a request."""
    log_content: bool = False
    """Writes prompts and answers to the log."""
    gateways: PositiveInt = 1
    """Gateway replicas: they check requests, decode pictures, and write."""
    gateway_cpus: NonNegativeFloat = 0.1
    """CPUs that each of them reserves."""
    min_replicas: NonNegativeInt = 1
    """Fewest engine replicas; 0 lets an idle endpoint sleep."""
    max_replicas: PositiveInt = 1
    """Most engine replicas."""
    target_ongoing: PositiveFloat = 8
    """Requests that a replica should have; more start another replica, fewer end one."""
    upscale_seconds: NonNegativeFloat = 10
    """How long there must be more before another replica starts."""
    downscale_seconds: NonNegativeFloat = 300
    """How long there must be fewer before one ends."""
    drain_seconds: NonNegativeFloat = 600
    """How long a replica that is to end may take for the answers that it has begun."""
    cpus_per_replica: NonNegativeFloat = 1
    """CPUs of an engine replica."""
    gpus_per_replica: NonNegativeFloat = 0
    """GPUs of an engine replica."""

    @model_validator(mode="after")
    def settings_go_together(self) -> Serving:
        if self.keys and self.no_keys:
            raise ValueError("keys and no_keys exclude each other")
        if self.engine == "vllm" and self.room.compile:
            raise ValueError("room.compile is of the built-in engine; vLLM compiles by itself")
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        return self
