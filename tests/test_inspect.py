"""Looking into a curated dataset, and moving its thresholds, against runs that had them from the start."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data

from pipelines import storage
from pipelines.curation import ledger
from pipelines.curation.curate import curate
from pipelines.curation.decode import Pictures
from pipelines.curation.export import export
from pipelines.curation.filters import Limits
from pipelines.curation.inspect import diff, explain, preview, verdicts
from pipelines.curation.ledger import manifest_of
from pipelines.curation.options import Curation
from pipelines.curation.rethreshold import rethreshold
from pipelines.curation.sources import find_shards, read_shard
from pipelines.settings import OwlError
from pipelines.training.dataset import Dataset

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


LOOSE = Limits(min_words=1, min_side=20, max_aspect=9, min_letters=0.0, max_pixels=2**40)


@pytest.mark.parametrize("limits", [TIGHT, LOOSE, Limits(min_words=8, min_side=20, max_aspect=1.4)], ids=str)
def test_moved_thresholds_equal_those_from_the_start(curated, world, tmp_path, limits):
    """Tighter, looser and both at once, duplicates included; and back again."""
    moved, fresh = f"{tmp_path}/moved", f"{tmp_path}/fresh"
    shutil.copytree(curated / "deduplicated", moved)
    manifest = rethreshold(moved, limits)
    wanted = curate([f"{world}/raw/pairs"], fresh, Curation(limits=limits))
    assert [manifest[name] for name in COUNTS] == [wanted[name] for name in COUNTS]
    for entry in manifest["shards"]:
        assert verdicts(moved, entry["shard"]) == verdicts(fresh, entry["shard"])
    assert read_pictures(moved) == read_pictures(fresh)
    for entry in manifest["shards"]:
        path = Path(moved, "shards", f"{entry['shard']}.arrow")
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
        assert len(storage.read_arrow(str(path))) == entry["rows"]
    assert (manifest["read_again"] > 0) == (limits is not TIGHT)
    assert manifest["read_again"] < 0.3 * manifest["in"]
    back = rethreshold(moved, Limits())
    assert back["dropped"] == manifest_of(str(curated / "deduplicated"))["dropped"]
    assert read_pictures(moved) == read_pictures(str(curated / "deduplicated"))


def read_pictures(folder: str) -> dict[str, bytes]:
    data = Dataset([folder])
    samples = (data.read(shard, row) for shard, rows in enumerate(data.rows) for row in range(rows))
    return {sample["source"]: sample["image"] for sample in samples}


def test_moved_thresholds_hold_when_more_raw_shards_come(cluster, world, tmp_path):
    """Also where no duplicates are looked for, so that nothing else reads the earlier shards again."""
    first, second, *_ = find_shards([f"{world}/raw/pairs"])
    output = f"{tmp_path}/out"
    curate([first], output, Curation(deduplication=None))
    tight = rethreshold(output, TIGHT)
    assert (tmp_path / "out" / "report.html").read_text().count(f"{tight['kept']:,}")
    both = curate([first, second], output, Curation(limits=TIGHT, deduplication=None))
    fresh = curate([first, second], f"{tmp_path}/fresh", Curation(limits=TIGHT, deduplication=None))
    assert [both[name] for name in COUNTS] == [fresh[name] for name in COUNTS]
    assert sum(Dataset([output]).rows) == both["kept"]


def test_captions_that_are_written_are_not_masked_later(curated):
    with pytest.raises(OwlError, match=r"limits.contacts keep → mask changes the captions that .* stored"):
        rethreshold(str(curated / "loose"), Limits(contacts="mask"))


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


@pytest.fixture(scope="module")
def exported(curated):
    output = str(curated / "deduplicated")
    for form in ("webdataset", "parquet", "arrow"):
        result = export(output, f"{curated}/as_{form}", form, megabytes=0)  # a file for each record batch
        assert result["rows"] == manifest_of(output)["kept"]
        assert result["files"] == len(manifest_of(output)["shards"])
    rows = []
    for entry in manifest_of(output)["shards"]:
        table = storage.open_arrow(f"{output}/shards/{entry['shard']}.arrow").read_all()
        out = set(ledger.selected_rows(output, entry["shard"]).to_pylist())
        rows += [row for number, row in enumerate(table.to_pylist()) if number not in out]
    return curated, rows


def test_exports_hold_the_selected_rows_in_order(exported):
    folder, rows = exported
    parquet = pq.read_table(folder / "as_parquet").to_pylist()
    assert parquet == rows
    arrows = [storage.open_arrow(str(path)).read_all() for path in sorted((folder / "as_arrow").iterdir())]
    assert pa.concat_tables(arrows).to_pylist() == rows


def test_exported_tars_are_raw_shards_again(exported):
    folder, rows = exported
    samples = [sample for path in find_shards([str(folder / "as_webdataset")]) for sample in read_shard(path)]
    assert [(s.key, s.images[0], s.captions) for s in samples] == [(r["key"], r["image"], r["caption"]) for r in rows]


def test_other_tools_open_the_exports(exported):
    folder, rows = exported
    datasets = pytest.importorskip("datasets")
    files = sorted(str(path) for path in (folder / "as_parquet").iterdir())
    assert len(datasets.load_dataset("parquet", data_files=files, split="train")) == len(rows)
    assert ray.data.read_parquet(files).count() == len(rows)
    duckdb = pytest.importorskip("duckdb")
    assert duckdb.connect().execute(f"select count(*) from '{folder}/as_parquet/*.parquet'").fetchall() == [
        (len(rows),)
    ]


def test_other_tools_open_the_tars(exported, world):
    """Stored at one size, all pictures are JPEGs, as Hugging Face's reader of WebDataset wants them alike."""
    datasets, wds = pytest.importorskip("datasets"), pytest.importorskip("webdataset")
    folder, rows = exported
    curate([f"{world}/raw/pairs"], f"{folder}/resized", Curation(pictures=Pictures(short_side=60)))
    export(f"{folder}/resized", f"{folder}/resized_tars", "webdataset", megabytes=0)
    tars = sorted(str(path) for path in (folder / "resized_tars").iterdir())
    loaded = datasets.load_dataset("webdataset", data_files=tars, split="train", streaming=True)
    assert [row["__key__"] for row in loaded] == [row["key"] for row in rows]
    assert [sample["__key__"] for sample in wds.WebDataset(tars, shardshuffle=False)] == [row["key"] for row in rows]


def test_an_unknown_format_is_refused(curated, tmp_path):
    with pytest.raises(OwlError, match="unknown format 'lance'; known: webdataset, parquet, arrow"):
        export(str(curated / "loose"), str(tmp_path), "lance", 1)


def test_the_report_shows_thresholds_captions_and_speed(curated):
    html = (curated / "deduplicated" / "report.html").read_text()
    for wanted in ("min_side 64", "Commonest captions", "samples a second", "CPU hours for a billion", "Funnel"):
        assert wanted in html
    for reason, number in manifest_of(str(curated / "deduplicated"))["dropped"].items():
        assert f"Dropped: {reason} ({number:,})" in html
