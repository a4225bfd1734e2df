"""The rivals of `owl bench curation` do the same work: they keep what the bare loop keeps, at 224 px."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pytest
from PIL import Image

from jobs import bench_curation
from jobs.bench_curation import WAYS, command_of, run
from jobs.bench_curation_set import write_set
from pipelines.settings import OwlError

COLUMNS = {
    "bare loop": ("key", "image", "caption"),
    "img2dataset": ("sample", "jpg", "caption"),
    "daft": ("key", "image", "caption"),
    "data-juicer": ("images", "image_bytes", "text"),
}
"""Where each way stores a sample's key, picture and caption."""


def kept(way: str, raw: str, out: Path) -> dict[str, tuple[str, tuple[int, int]]]:
    """{key: (caption, size in pixels)} of what a way keeps. Skips the test where its environment is missing."""
    try:
        command = command_of(way)
    except OwlError as error:
        pytest.skip(str(error))
    run([*command, raw, "--out", str(out)])
    kind = "arrow" if way == "bare loop" else "parquet"
    table = pa.dataset.dataset([str(path) for path in out.glob(f"*.{kind}")], format=kind).to_table()
    if "status" in table.column_names:
        table = table.filter(pc.equal(table["status"], "success"))  # img2dataset has a row for what it drops, too
    rows = {}
    for key, image, caption in zip(*(table[name].to_pylist() for name in COLUMNS[way]), strict=True):
        key, image = (value[0] if isinstance(value, list) else value for value in (key, image))
        rows[key] = (caption, Image.open(io.BytesIO(image)).size)
    assert len(rows) == len(table), f"{way} stores a key twice"
    return rows


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("rivals") / "raw")
    write_set(folder, 500)
    return folder


@pytest.fixture(scope="module")
def expected(raw, tmp_path_factory):
    return kept("bare loop", raw, tmp_path_factory.mktemp("rivals") / "bare")


@pytest.fixture(scope="module")
def originals(raw, expected) -> dict[str, tuple[int, int]]:
    """Sizes in pixels of the raw pictures that are to be kept."""
    sizes = {}
    for path in Path(raw).glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if extension == "jpg" and key in expected:
                    sizes[key] = Image.open(tar.extractfile(member)).size
    return sizes


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in COLUMNS if way != "bare loop"])
def test_a_rival_keeps_what_the_bare_loop_keeps(way, raw, expected, originals, tmp_path):
    rows = kept(way, raw, tmp_path / "out")
    assert rows.keys() == expected.keys()
    for key, (caption, size) in rows.items():
        assert caption == expected[key][0]
        scale = min(1.0, 224 / min(originals[key]))
        assert size == pytest.approx([side * scale for side in originals[key]], abs=1)
        assert min(size) == min(224, *originals[key])


def test_a_rival_without_its_environment_is_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_curation, "RIVALS", tmp_path)
    for way in ("img2dataset", "daft", "data-juicer"):
        with pytest.raises(OwlError, match=f"no environment for {way} .*make rivals"):
            command_of(way)
    assert command_of("bare loop") == [sys.executable, *WAYS["bare loop"].arguments]


def test_cpu_that_a_way_excludes_is_told_apart():
    cost = run([sys.executable, "-c", "import time; time.sleep(0.3); print('done'); print('{\"excluded_cpu_s\": 5}')"])
    assert cost.excluded == 5
    assert -5 <= cost.cpu < -3
    assert run([sys.executable, "-c", "print('done')"]).excluded == 0
