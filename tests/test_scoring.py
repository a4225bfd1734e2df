"""Scores by tiny models of the real classes, against the same models asked one picture at a time."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPModel,
    CLIPProcessor,
)

from pipelines import storage
from pipelines.curation import ledger
from pipelines.curation.curate import curate
from pipelines.curation.filters import Limits
from pipelines.curation.inspect import verdicts
from pipelines.curation.likeness import Deduplication
from pipelines.curation.options import Curation
from pipelines.curation.rethreshold import rethreshold
from pipelines.curation.scoring import Scoring
from pipelines.settings import OwlError
from pipelines.training.dataset import Dataset


@pytest.fixture(scope="module")
def scored(cluster, world, scorers, tmp_path_factory):
    output = str(tmp_path_factory.mktemp("scored") / "pairs")
    scoring = Scoring(image_text=scorers["clip"], aesthetic=scorers["head"], watermark=scorers["marks"], batch_size=16)
    settings = Curation(scoring=scoring, deduplication=Deduplication(semantic=0.99999))
    return output, curate([f"{world}/raw/pairs"], output, settings)


def test_scores_equal_those_of_one_picture_alone(scored, scorers):
    output, manifest = scored
    model, processor = CLIPModel.from_pretrained(scorers["clip"]), CLIPProcessor.from_pretrained(scorers["clip"])
    shard = manifest["shards"][0]["shard"]
    table = ledger.read_ledger(output, shard)
    rows = [row for row in table.to_pylist() if row["row"] is not None]
    pictures = storage.open_arrow(f"{output}/shards/{shard}.arrow").read_all()
    embeddings = ledger.embeddings(output, shard, table["row"]).to_pylist()
    embeddings = [e for e, row in zip(embeddings, table["row"].to_pylist(), strict=True) if row is not None]
    for row, embedding in list(zip(rows, embeddings, strict=True))[:8]:
        stored = pictures.slice(row["row"], 1).to_pylist()[0]
        image = Image.open(io.BytesIO(stored["image"])).convert("RGB")
        with torch.no_grad():
            out = model(**processor(text=stored["caption"], images=image, return_tensors="pt", padding=True))
        cosines = (out.image_embeds @ out.text_embeds.T)[0]
        assert row["image_text"] == pytest.approx(cosines.max().item(), abs=1e-5)
        assert np.allclose(embedding, out.image_embeds[0].numpy(), atol=1e-3)
        assert 0 < row["watermark"] < 1
        assert row["aesthetic"] is not None
    assert rows[0]["unsafe"] is None


def test_thresholds_on_scores_move_both_ways(scored, tmp_path):
    output, manifest = scored
    moved = str(tmp_path / "moved")
    shutil.copytree(output, moved)
    values = [
        row["image_text"]
        for entry in manifest["shards"]
        for row in ledger.read_ledger(output, entry["shard"]).to_pylist()
        if row["verdict"] == "kept"
    ]
    middle = float(np.median(values))
    tight = rethreshold(moved, Limits(min_image_text=middle))
    assert tight["dropped"]["score_image_text"] >= len(values) // 2
    assert tight["read_again"] == 0
    assert sum(Dataset([moved]).rows) == tight["kept"]
    assert rethreshold(moved, Limits())["dropped"] == manifest["dropped"]
    for entry in manifest["shards"]:
        assert verdicts(moved, entry["shard"]) == verdicts(output, entry["shard"])


def test_scorers_that_cannot_be_are_refused_by_name(cluster, world, scorers, tmp_path):
    raw = [f"{world}/raw/pairs"]
    with pytest.raises(OwlError, match=r"scoring.unsafe names /nowhere, which is not there"):
        curate(raw, f"{tmp_path}/a", Curation(scoring=Scoring(unsafe="/nowhere")))
    with pytest.raises(ValueError, match=r"deduplication.semantic needs scoring.image_text"):
        curate(raw, f"{tmp_path}/b", Curation(deduplication=Deduplication(semantic=0.9)))
    with pytest.raises(ValueError, match=r"scoring.aesthetic is a head on scoring.image_text's embedding"):
        curate(raw, f"{tmp_path}/c", Curation(scoring=Scoring(aesthetic=scorers["head"])))
    with pytest.raises(ValueError, match=r"limits.min_image_text asks for a score that scoring.image_text must give"):
        curate(raw, f"{tmp_path}/d", Curation(limits=Limits(min_image_text=0.2)))
