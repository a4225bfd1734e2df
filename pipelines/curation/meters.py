"""What a curation tells Ray's exporter: ray_owl_curate_…, by dataset."""

from __future__ import annotations

from ray.util.metrics import Counter

from pipelines import storage


class Meters:
    """Kept by one process for the whole job, so that each number is one series."""

    def __init__(self, output: str):
        self.tags = {"dataset": storage.name_of(output)}
        keys = ("dataset",)
        about = "Raw samples judged, by the reason they were dropped for; fit, where there was none"
        self.samples = Counter("owl_curate_samples", about, tag_keys=("dataset", "reason"))
        about = "Fit samples that a later verdict dropped, such as a duplicate, by reason"
        self.later = Counter("owl_curate_later", about, tag_keys=("dataset", "reason"))
        self.shards = Counter("owl_curate_shards", "Raw shards that are done", tag_keys=keys)
        self.bytes = Counter("owl_curate_bytes", "Bytes of the raw shards that are done", tag_keys=keys)

    def judged(self, marker: dict, size: int) -> None:
        self.shards.inc(1, tags=self.tags)
        if size:
            self.bytes.inc(size, tags=self.tags)
        count(self.samples, {"fit": marker["kept"], **marker["dropped"]}, self.tags)

    def decided(self, dropped: dict[str, int]) -> None:
        count(self.later, dropped, self.tags)


def count(counter: Counter, numbers: dict[str, int], tags: dict[str, str]) -> None:
    for reason, number in numbers.items():
        if number:
            counter.inc(number, tags={**tags, "reason": reason})
