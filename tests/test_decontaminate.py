"""A benchmark's pictures and questions are found in a curated dataset and left out, and nothing else."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pipelines.curation import ledger
from pipelines.curation.curate import curate
from pipelines.curation.filters import Limits
from pipelines.curation.options import Curation
from pipelines.curation.rethreshold import rethreshold
from pipelines.evaluation.decontaminate import decontaminate
from pipelines.settings import OwlError

LONG = "Which of the birds on the old stone wall is looking at the small black cat below it?"


def drawing(seed: int) -> Image.Image:
    """Smooth random shapes, as unlike each other as photographs."""
    random = np.random.default_rng(seed)
    noise = Image.fromarray(random.integers(0, 255, (12, 12, 3), dtype=np.uint8)).resize((160, 160))
    return noise.filter(ImageFilter.GaussianBlur(4))


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def write_benchmark(folder: Path) -> None:
    """VQAv2's layout about four drawings; one question is long."""
    (folder / "val2014").mkdir(parents=True)
    texts = [LONG, "What is this?", "Is it red?", "How many?"]
    asked = [{"image_id": n, "question_id": n, "question": text} for n, text in enumerate(texts)]
    told = [{"question_id": n, "answers": [{"answer": "yes"}] * 10} for n in range(4)]
    for n in range(4):
        (folder / f"val2014/COCO_val2014_{n:012d}.jpg").write_bytes(encoded(drawing(n)))
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": asked}))
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": told}))


def samples() -> dict[str, tuple[bytes, dict]]:
    ask = [{"from": "human", "value": f"<image>\nLook. {LONG}"}, {"from": "gpt", "value": "The left one."}]
    short = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A drawing of shapes."}]
    return {
        "same-bytes": (encoded(drawing(0)), {"caption": "some coloured shapes on a wall"}),
        "smaller-jpeg": (encoded(drawing(1).resize((120, 120)), "JPEG", quality=70), {"caption": "shapes and colours"}),
        "question": (encoded(drawing(50)), {"conversations": ask}),
        "part-of-it": (encoded(drawing(51)), {"caption": f"They asked: {LONG[10:]}"}),
        "short-question": (encoded(drawing(52)), {"conversations": short}),
        **{f"other-{n}": (encoded(drawing(100 + n)), {"caption": f"plain shapes number {n} here"}) for n in range(6)},
    }


FOUND = {"same-bytes", "smaller-jpeg", "question", "part-of-it"}


@pytest.fixture(params=[True, False], ids=["hashed", "not hashed"])
def dataset(request, cluster, tmp_path) -> str:
    """A curated dataset; without deduplication its pictures have no hashes."""
    with tarfile.open(tmp_path / "raw.tar", "w") as tar:
        for key, (data, told) in samples().items():
            for name, content in ((f"{key}.png", data), (f"{key}.json", json.dumps(told).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    settings = Curation(limits=Limits(min_side=32))
    if not request.param:
        settings = settings.model_copy(update={"deduplication": None})
    curate([f"{tmp_path}/raw.tar"], f"{tmp_path}/data", settings)
    return f"{tmp_path}/data"


def left_out(dataset: str) -> set[str]:
    shard = ledger.manifest_of(dataset)["shards"][0]["shard"]
    rows = ledger.read_ledger(dataset, shard).to_pylist()
    return {row["key"] for row in rows if row["reason"] == "benchmark"}


def test_what_is_a_benchmarks_is_left_out(dataset, tmp_path):
    write_benchmark(tmp_path / "vqa")
    before = ledger.manifest_of(dataset)
    result = decontaminate(dataset, "vqav2", f"{tmp_path}/vqa")
    assert left_out(dataset) == FOUND
    assert result["found"] == {"picture": 2, "question": 2, "samples": 4}
    assert result["kept"] == before["kept"] - 4
    assert result["dropped"]["benchmark"] == 4
    manifest = ledger.manifest_of(dataset)
    assert manifest["decontaminated"] == {"vqav2": result["found"]}
    shard = manifest["shards"][0]["shard"]
    assert len(ledger.selected_rows(dataset, shard)) == 4
    details = {row["detail"] for row in ledger.read_ledger(dataset, shard).to_pylist() if row["reason"] == "benchmark"}
    assert details == {"vqav2: a picture of it", "vqav2: a question of it"}
    assert decontaminate(dataset, "vqav2", f"{tmp_path}/vqa")["found"] == result["found"]  # again: nothing changes
    assert left_out(dataset) == FOUND
    rethreshold(dataset, Limits(min_side=32, min_words=1))
    assert left_out(dataset) == FOUND
    assert ledger.manifest_of(dataset)["decontaminated"] == {"vqav2": result["found"]}


def test_an_unfinished_dataset_is_refused(tmp_path):
    with pytest.raises(OwlError, match="no curated dataset at"):
        decontaminate(str(tmp_path), "vqav2", str(tmp_path))
