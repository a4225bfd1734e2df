"""report.html of a run: where the losses went, where the time went, what was used, and what the model answered."""

from __future__ import annotations

import base64
import json

from markupsafe import Markup

from pipelines import storage
from pipelines.page import bars, code, figure, lines, numbers, page, pictures, section, table
from pipelines.training.stages import Stage

TIMES = ("compute", "wait", "checkpoint")


def write_report(path: str, stage: str, settings: Stage, run: str, logged: dict) -> None:
    history, used = logged["history"], logged["used"]
    checks = [storage.read_json(name) for name in storage.listing(f"{run}/validation", ".json")]
    last = history[-1]
    named = {name: storage.name_of(name) for name in used}
    losses = {"all": [(entry["step"], entry["loss"]) for entry in history]}
    if len(used) > 1:
        for name, short in named.items():
            points = [(entry["step"], entry["losses"].get(name)) for entry in history]
            losses[short] = [(step, loss) for step, loss in points if loss is not None]
    if checks:
        losses["validation"] = [(check["step"], check["validation_loss"]) for check in checks]
    norms = {part: [(e["step"], e["norms"][part]) for e in history if part in e["norms"]] for part in last["norms"]}
    times = [(name, spent(history, name), f"{spent(history, name):.1%}") for name in TIMES]
    samples = [(short, name, f"{used[name]:,}") for name, short in named.items()]
    parts = [
        section("At the end", numbers(summary(history, checks))),
        section("Loss a supervised token", lines(losses, "step", "nats")),
        section("Norm of the gradient", lines(norms, "step", "before clipping")),
        section("Where the time went", bars(times)),
        section("Samples used", table(("dataset", "folder", "samples"), samples, numeric=2)),
        section("What trained", table(("part", "trainable", "all"), trained(logged["parameters"]))),
    ]
    if checks and checks[-1]["answers"]:
        shown = [answered(told) for told in checks[-1]["answers"]]
        parts.append(section(f"Answers after {checks[-1]['step']:,} steps", pictures(shown)))
    parts.append(section("Settings", code(json.dumps(settings.model_dump(), indent=1, ensure_ascii=False))))
    storage.write_text(path, page(f"Training: {stage}", run, *parts))


def summary(history: list[dict], checks: list[dict]) -> dict[str, str]:
    last, seconds = history[-1], sum(entry["seconds"] for entry in history)
    found = {"steps": f"{last['step']:,}", "loss": f"{last['loss']:.4f}"}
    if checks:
        found["validation loss"] = f"{checks[-1]['validation_loss']:.4f}"
    return {
        **found,
        "hours": f"{seconds / 3600:.2f}",
        "tokens a second": f"{spent(history, 'tokens_per_second'):,.0f}",
        "pictures a second": f"{spent(history, 'pictures_per_second'):,.1f}",
        "of the matrices' peak": f"{spent(history, 'share_of_peak'):.1%}",
        "padding": f"{spent(history, 'padding'):.1%}",
        "samples cut": f"{last['cut']:,}",
        "unsupervised": f"{last['unsupervised']:,}",
    }


def spent(history: list[dict], name: str) -> float:
    """The mean of an entry over the run, by time."""
    return sum(entry[name] * entry["seconds"] for entry in history) / sum(entry["seconds"] for entry in history)


def trained(parameters: dict[str, dict[str, int]]) -> list[tuple[str, str, str]]:
    return [(name, f"{count['trainable']:,}", f"{count['total']:,}") for name, count in parameters.items()]


def answered(told: dict) -> Markup:
    words = Markup("{}<br><b>{}</b><br>expected: {}").format(told["asked"], told["answer"], told["expected"])
    return figure([base64.b64decode(told["picture"]) if told["picture"] else None], words)
