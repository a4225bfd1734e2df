"""How many nodes Ray's scheduler carries, as far as nodes that share one machine tell: the time and memory of each, and
how fast shards are handed out over them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import psutil


def measure(most: int, tasks: int) -> Iterator[dict[str, Any]]:
    """A cluster that doubles its nodes of one CPU until there are ``most``; at each size, ``tasks`` tasks
    that do nothing, spread over all."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    cluster.add_node(num_cpus=0, object_store_memory=80 << 20, include_dashboard=False)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        nodes, bare = 0, memory()
        while nodes < most:
            began = time.monotonic()
            wanted = min(most, max(1, nodes * 2))
            for _ in range(wanted - nodes):
                cluster.add_node(num_cpus=1, object_store_memory=80 << 20, wait=False)
            cluster.wait_for_nodes(timeout=600)
            seconds, added, nodes = time.monotonic() - began, wanted - nodes, wanted
            idle = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(where)
            ray.get([idle.remote() for _ in range(nodes)])  # a worker process on each
            began = time.monotonic()
            places = ray.get([idle.remote() for _ in range(tasks)])
            yield {
                "nodes": nodes,
                "seconds_a_node": round(seconds / added, 2),
                "mb_a_node": round((memory() - bare) / nodes / 1e6),
                "tasks_a_second": round(tasks / (time.monotonic() - began)),
                "nodes_used": len(set(places)),
            }
    finally:
        ray.shutdown()
        cluster.shutdown()


def where() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def memory() -> int:
    """Resident bytes of this process and all that it started, each shared page counted once."""
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total
