"""One progress bar for work that is spread over a cluster: workers tell a tiny actor, the driver draws what it knows.

On a terminal this is a live bar; elsewhere (a log, CI) a line now and then; and always a pair of gauges.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import ray
from ray.util.metrics import Gauge
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10
GAUGES = {"done": "What a running job has done", "expected": "What it has to do"}
"""For Ray's exporter: any job's speed is the rate of the one, and its end is where they meet."""


@ray.remote(num_cpus=0)
class Counter:
    def __init__(self, done: int):
        self.done = done
        self.text = ""

    def advance(self, number: int, text: str = "") -> None:
        self.done += number
        self.text = text or self.text

    def at(self, done: int, text: str) -> None:
        self.done, self.text = done, text

    def read(self) -> tuple[int, str]:
        return self.done, self.text


@contextlib.contextmanager
def progress(
    title: str, total: int, unit: str, done: int = 0, counter: ray.actor.ActorHandle | None = None
) -> Iterator[ray.actor.ActorHandle]:
    """Yields the handle that workers call ``advance`` or ``at`` on; or draws what another actor's ``read`` tells."""
    own = counter is None
    counter = counter or Counter.remote(done)  # type: ignore[attr-defined]
    stop = threading.Event()
    drawing = threading.Thread(target=draw, args=(counter, title, total, unit, stop), daemon=True)
    drawing.start()
    try:
        yield counter
    finally:
        stop.set()
        drawing.join(timeout=5)
        if own:
            ray.kill(counter)


def draw(counter, title: str, total: int, unit: str, stop: threading.Event) -> None:
    console = Console(stderr=True)
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[text]}"),
    )
    started = spoke = time.monotonic()
    done, text = 0, ""
    gauges = {name: Gauge(f"owl_progress_{name}", about, tag_keys=("work", "unit")) for name, about in GAUGES.items()}
    tags = {"work": title, "unit": unit}
    gauges["expected"].set(total, tags=tags)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task(title, total=total, text="")
        while True:
            last = stop.wait(0.3)
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):  # what was last known stays
                done, text = ray.get(counter.read.remote(), timeout=2)
            bars.update(bar, completed=done, text=text)
            gauges["done"].set(done, tags=tags)
            now = time.monotonic()
            due = now - spoke > SECONDS_BETWEEN_LINES or (last and now - started > 1)
            if not console.is_terminal and due:
                console.print(f"  {title}: {done}/{total} {unit}, {now - started:.0f} s  {text}", highlight=False)
                spoke = now
            if last:
                return
