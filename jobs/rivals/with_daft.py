"""Daft: a generator reads the tars, an expression counts words, and Pillow in a batch function makes the pictures.

    .rivals/daft/bin/python jobs/rivals/with_daft.py RAW_FOLDER --out FOLDER

Daft's own resize knows no ratio to keep and its own JPEG no quality. Its read_webdataset is left out because 0.7.26
stands still for ever where there are as many tars as CPUs, and costs half as much again where it is kept from that.
"""

from __future__ import annotations

import os
import sys
import tarfile
from collections.abc import Iterator

os.environ["DO_NOT_TRACK"] = "1"  # it would send telemetry

import daft
from daft import DataType, col
from daft.functions import list_count, regexp_split, unnest
from with_pillow import FEWEST, shrink

SAMPLE = DataType.struct({"key": DataType.string(), "jpg": DataType.binary(), "txt": DataType.string()})


@daft.func(return_dtype=SAMPLE)
def samples(path: str) -> Iterator[dict]:
    """The samples of a tar: what lies side by side under one name."""
    sample: dict = {}
    with tarfile.open(path.removeprefix("file://")) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            if sample and sample["key"] != key:
                yield sample
                sample = {}
            file = tar.extractfile(member)
            assert file is not None
            data = file.read()
            sample |= {"key": key, extension: data if extension == "jpg" else data.decode()}
    if sample:
        yield sample


@daft.func.batch(return_dtype=DataType.binary(), batch_size=64)
def stored(pictures: daft.Series) -> list[bytes | None]:
    """JPEGs of 224 px on the shorter side; None where a picture is unfit."""
    return [shrink(data) for data in pictures.to_pylist()]


def curate(raw: str, out: str) -> None:
    data = daft.from_glob_path(f"{raw}/*.tar").select(unnest(samples(col("path"))))
    data = data.where(list_count(regexp_split(col("txt"), r"\s+")) >= FEWEST)
    data = data.select(col("key"), stored(col("jpg")).alias("image"), col("txt").alias("caption"))
    data.where(col("image").not_null()).write_parquet(out)


if __name__ == "__main__":
    raw_folder, _, out_folder = sys.argv[1:]
    curate(raw_folder, out_folder)
    os._exit(0)  # all is written; a thread of Daft's now and then crashes the interpreter while it ends
