"""What a curation is told: limits, pictures, scores, duplicates, and when to stop."""

from __future__ import annotations

from pydantic import model_validator

from pipelines.curation.decode import Pictures
from pipelines.curation.filters import SCORE_LIMITS, Limits
from pipelines.curation.likeness import Deduplication
from pipelines.curation.scoring import Scoring
from pipelines.settings import Settings


class Curation(Settings):
    """What a curated dataset is made of and held to."""

    limits: Limits = Limits()
    """Thresholds of the caption and picture filters, and of scores."""
    pictures: Pictures = Pictures()
    """What is stored of a picture."""
    scoring: Scoring = Scoring()
    """Models that score what was stored."""
    deduplication: Deduplication | None = Deduplication()
    """How duplicates are found; None keeps them."""
    max_error_rate: float = 0.2
    """The job stops without a manifest if more than this share of all samples is undecodable or malformed; it looks
    from the thousandth sample on."""
    max_tries: int = 3
    """A raw shard that took its worker process down this often is set aside."""
    max_set_aside: int = 0
    """Raw shards that may be unreadable or set aside before the job ends without a manifest."""
    cpu_hour_price: float = 0.04
    """What an hour of a CPU costs, for the report."""

    @model_validator(mode="after")
    def scores_come_from_somewhere(self) -> Curation:
        for name, limit in SCORE_LIMITS.items():
            if getattr(self.limits, limit) is not None and not getattr(self.scoring, name):
                raise ValueError(f"limits.{limit} asks for a score that scoring.{name} must give")
        asked = self.deduplication
        needs = asked and (
            "semantic" if asked.semantic is not None else "keep=score" if asked.keep == "score" else None
        )
        if needs and not self.scoring.image_text:
            raise ValueError(f"deduplication.{needs} needs scoring.image_text")
        if self.scoring.aesthetic and not self.scoring.image_text:
            raise ValueError("scoring.aesthetic is a head on scoring.image_text's embedding, which is not given")
        return self
