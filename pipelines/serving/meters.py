"""What an endpoint measures of itself, under vLLM's names with our prefix where they mean the same.

A gateway counts for its own /metrics page, and, on Ray Serve, for Ray's exporter too, where all replicas add up; an
engine replica tells Ray's exporter alone.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import ray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from ray.util import metrics as of_ray


class Meter(NamedTuple):
    kind: type
    text: str
    labels: tuple[str, ...] = ("model_name", "key")
    buckets: tuple[float, ...] = ()


SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
OWN = ("replica",)

METERS = {
    "request_success_total": Meter(Counter, "Answers, by how they ended", ("model_name", "key", "finished_reason")),
    "request_errors_total": Meter(Counter, "Requests that got no answer, by HTTP status", ("key", "status")),
    "admission_rejections_total": Meter(Counter, "Requests refused for now, by reason", ("key", "reason")),
    "prompt_tokens_total": Meter(Counter, "Tokens of prompts"),
    "generation_tokens_total": Meter(Counter, "Tokens of answers"),
    "prompt_tokens_cached_total": Meter(Counter, "Tokens of prompts whose keys and values were known"),
    "pictures_total": Meter(Counter, "Pictures of requests"),
    "request_retries_total": Meter(Counter, "Answers begun again since their engine went away"),
    "time_to_first_token_seconds": Meter(Histogram, "From a request's arrival to its first token", buckets=SECONDS),
    "inter_token_latency_seconds": Meter(Histogram, "Between one piece of an answer and the next", buckets=SECONDS),
    "request_time_per_output_token_seconds": Meter(Histogram, "Mean time of a token after the first", buckets=SECONDS),
    "e2e_request_latency_seconds": Meter(Histogram, "From a request's arrival to its end", buckets=SECONDS),
    "picture_seconds": Meter(Histogram, "Of fetching and decoding a request's pictures", buckets=SECONDS),
    "request_prompt_tokens": Meter(Histogram, "Tokens of a prompt", buckets=COUNTS),
    "request_generation_tokens": Meter(Histogram, "Tokens of an answer", buckets=COUNTS),
    "num_requests_in_flight": Meter(Gauge, "Requests that this gateway is answering", OWN),
    "num_requests_running": Meter(Gauge, "Requests in the engine's running batch", OWN),
    "num_requests_waiting": Meter(Gauge, "Requests that wait in the engine", OWN),
    "kv_cache_usage_perc": Meter(Gauge, "Share of the engine's cache that is taken, 1 is all", OWN),
    "mm_cache_hits": Meter(Gauge, "Pictures that the engine had embeddings of, since its start", OWN),
    "mm_cache_queries": Meter(Gauge, "Pictures that the engine was asked for, since its start", OWN),
    "prefix_cache_hits": Meter(Gauge, "Prompt tokens the engine had keys and values of, since its start", OWN),
    "prefix_cache_queries": Meter(Gauge, "Prompt tokens the engine was asked for, since its start", OWN),
}


TOLD = {
    "num_requests_running": "running",
    "num_requests_waiting": "waiting",
    "kv_cache_usage_perc": "cache",
    "mm_cache_hits": "pictures_known",
    "prefix_cache_hits": "cached_tokens",
    "prefix_cache_queries": "prompt_tokens",
}
"""Meter → what an engine's `stats` call it."""


class Meters:
    def __init__(self, replica: str):
        self.replica, self.registry = replica, CollectorRegistry()
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.own = {name: self.make(name, meter) for name, meter in METERS.items()}
        self.rays = {name: of_ray_(name, meter) for name, meter in METERS.items()} if ray.is_initialized() else {}

    def make(self, name: str, meter: Meter) -> Any:
        more = {"buckets": meter.buckets} if meter.buckets else {}
        return meter.kind(f"owl:{name}", meter.text, meter.labels, registry=self.registry, **more)

    def count(self, name: str, amount: float = 1, /, **labels: str) -> None:
        self.own[name].labels(**labels).inc(amount)
        if self.rays and amount:
            self.rays[name].inc(amount, tags=labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self.own[name].labels(**labels).observe(value)
        if self.rays:
            self.rays[name].observe(value, tags=labels)

    def set(self, name: str, value: float) -> None:
        self.own[name].labels(replica=self.replica).set(value)
        if self.rays:
            self.rays[name].set(value, tags={"replica": self.replica})

    def tell(self, stats: dict[str, float]) -> None:
        """What an engine says of itself (engine.Engine.stats)."""
        for name, of in TOLD.items():
            if of in stats:
                self.set(name, stats[of])
        if "pictures_known" in stats:
            self.set("mm_cache_queries", stats["pictures_known"] + stats["pictures_encoded"])

    def add(self, name: str, amount: float) -> None:
        """To a gauge, which is nought at first."""
        self.sums[name] += amount
        self.set(name, self.sums[name])

    def page(self) -> bytes:
        return generate_latest(self.registry)


def of_ray_(name: str, meter: Meter) -> Any:
    """Ray's exporter takes no colon into names, and puts ray_ before them."""
    kinds: dict[type, Any] = {Counter: of_ray.Counter, Gauge: of_ray.Gauge, Histogram: of_ray.Histogram}
    more: dict[str, Any] = {"boundaries": list(meter.buckets)} if meter.buckets else {}
    return kinds[meter.kind](f"owl_{name}", meter.text, tag_keys=meter.labels, **more)
