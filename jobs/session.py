"""One quiet Ray: on this machine where RAY_ADDRESS names no cluster, with nothing sent anywhere."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from pipelines.settings import OwlError

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",
    "RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION": "0.1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",  # comes with that: gateways would open ports, and end 30 s late
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}
"""Set before Ray is imported, unless the user has set it."""


def prepare_environment() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def ray_session(cpus: int | None = None) -> Iterator[None]:
    """A Ray to work on. One that was started here ends with the block, whatever ends it. Raises OwlError where
    RAY_ADDRESS names a dashboard, which takes jobs, but no drivers."""
    prepare_environment()
    if (address := os.environ.get("RAY_ADDRESS", "")).startswith("http"):
        raise OwlError(f"RAY_ADDRESS is the dashboard {address}: put `owl submit` before the verb, or unset it")
    import ray
    import ray.data

    for name in ("ray.data", "ray.train", "ray.serve", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if os.environ.get("OWL_LOGS") == "json":  # every line of a worker's log is an object that names job, task and node
        quiet = {"logging_config": ray.LoggingConfig(encoding="JSON", log_level="INFO"), "log_to_driver": False}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        ray.init(address="local", num_cpus=cpus, include_dashboard=True, **quiet)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C; after Ray has set a handler that aborts
    try:
        yield
    except KeyboardInterrupt:
        print("\nowl: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    finally:
        ray.shutdown()
