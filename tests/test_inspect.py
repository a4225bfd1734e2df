"""Looking into a curated dataset, and moving its thresholds, against runs that had them from the start."""

from __future__ import annotations

import shutil
from collections import Counter

import pyarrow.parquet as pq
import pytest

from pipelines.curation import ledger
from pipelines.curation.curate import Curation, curate
from pipelines.curation.filters import Limits
from pipelines.curation.inspect import diff, explain, is_looser, manifest_of, preview, rethreshold, verdicts
from pipelines.settings import OwlError
from pipelines.training.feed import Dataset

COUNTS = ("in", "kept", "dropped")
TIGHT = Limits(min_words=6, min_side=80, max_repetition=0.5)


@pytest.fixture(scope="module")
def curated(cluster, world, tmp_path_factory):
    """The same raw shards under loose limits, and under tight ones from the start; duplicates stay, so that both keep
    the same one of a group."""
    folder = tmp_path_factory.mktemp("inspected")
    raw = [f"{world}/raw/pairs"]
    for name, limits in (("loose", Limits()), ("tight", TIGHT)):
        curate(raw, f"{folder}/{name}", Curation(limits=limits, deduplication=None))
    curate(raw, f"{folder}/deduplicated", Curation())
    return folder


def test_tightened_equals_tight_from_the_start(curated, tmp_path):
    moved = str(tmp_path / "moved")
    shutil.copytree(curated / "loose", moved)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "moved" / "shards").iterdir()}
    manifest = rethreshold(moved, TIGHT)
    wanted = manifest_of(str(curated / "tight"))
    assert (manifest["in"], manifest["kept"], manifest["dropped"]) == tuple(
        wanted[k] for k in ("in", "kept", "dropped")
    )
    for entry in manifest["shards"]:
        assert verdicts(moved, entry["shard"]) == verdicts(str(curated / "tight"), entry["shard"])
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "moved" / "shards").iterdir()}
    assert sum(Dataset([moved]).rows) == wanted["kept"]
    assert rethreshold(moved, TIGHT)["kept"] == wanted["kept"]


def test_duplicates_stay_out_when_limits_are_tightened(curated, tmp_path):
    moved = str(tmp_path / "moved")
    shutil.copytree(curated / "deduplicated", moved)
    before = manifest_of(moved)["dropped"]
    after = rethreshold(moved, TIGHT)["dropped"]
    assert {k: v for k, v in after.items() if k.startswith("duplicate")} == {
        k: v for k, v in before.items() if k.startswith("duplicate")
    }
    for entry in manifest_of(moved)["shards"]:
        rows = pq.read_table(f"{moved}/selection/{entry['shard']}.parquet").to_pylist()
        out = [row for row in ledger.read_ledger(moved, entry["shard"]).to_pylist() if row["row"] is not None]
        assert Counter(row["reason"] for row in rows) == Counter(row["reason"] for row in out if row["reason"])


def test_a_looser_limit_is_refused_by_name(curated):
    with pytest.raises(OwlError, match=r"limits.min_words 2 → 1 would let in what .* never stored"):
        rethreshold(str(curated / "loose"), Limits(min_words=1))


@pytest.mark.parametrize(
    ("name", "old", "new", "looser"),
    [
        ("min_side", 64, 32, True),
        ("min_side", 64, 80, False),
        ("max_aspect", 3.0, 4.0, True),
        ("languages", [], ["en"], False),
        ("languages", ["en"], [], True),
        ("languages", ["en", "de"], ["de"], False),
        ("boilerplate", ["a"], ["a", "b"], False),
        ("boilerplate", ["a"], [], True),
        ("contacts", "keep", "drop", False),
        ("contacts", "drop", "keep", True),
        ("contacts", "keep", "mask", True),
        ("animated", True, False, False),
        ("animated", False, True, True),
    ],
)
def test_which_way_is_looser(name, old, new, looser):
    assert is_looser(name, old, new) == looser


def test_explain_tells_everything_of_a_sample(curated):
    output = str(curated / "deduplicated")
    shard = manifest_of(output)["shards"][0]["shard"]
    rows = ledger.read_ledger(output, shard).to_pylist()
    dropped = next(row for row in rows if row["reason"] == "image_small")
    told = explain(output, dropped["key"])
    assert [(row["reason"], row["verdict"], row["curated"]) for row in told] == [("image_small", "dropped", None)]
    kept = explain(output, next(row["key"] for row in rows if row["reason"] is None))[0]
    assert kept["curated"].startswith(output)
    assert kept["words"] >= 2
    with pytest.raises(OwlError, match="no sample 'nobody' ever came into"):
        explain(output, "nobody")


def test_diff_counts_what_moved(curated):
    loose, tight = str(curated / "loose"), str(curated / "tight")
    result = diff(loose, tight)
    gone = manifest_of(loose)["kept"] - manifest_of(tight)["kept"]
    assert sum(n for change, n in result["moved"].items() if change.startswith("kept → ")) == gone
    assert result["same"] + sum(result["moved"].values()) == manifest_of(loose)["in"]
    assert diff(loose, loose)["moved"] == {}


def test_preview_is_what_a_run_would_do(curated, world):
    result = preview([f"{world}/raw/pairs"], Curation(deduplication=None), 10_000)
    wanted = manifest_of(str(curated / "loose"))
    assert [result[k] for k in COUNTS] == [wanted[k] for k in COUNTS]
    assert preview([f"{world}/raw/pairs"], Curation(), 30)["in"] <= 33
