"""Data-Juicer on Ray: its own filters of words, shape and ratio, and a mapper for the resizing that it has not.

    .rivals/data_juicer/bin/python jobs/rivals/with_data_juicer.py RAW_FOLDER --out FOLDER

The mapper comes before the filters of pictures, which decode what they judge: they find the same in the stored picture,
whose ratio is kept and which is never enlarged, for much less. Parallelism is Ray's own affair, so that Ray can fuse
the operators; with Data-Juicer's automatic limits every picture is handed from process to process.
"""

from __future__ import annotations

import os
import sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import pyarrow as pa
import ray
import ray.data
from data_juicer.core.data.ray_dataset import RayDataset
from data_juicer.ops import load_ops
from data_juicer.ops.base_op import OPERATORS, Mapper
from PIL import ImageFile
from with_pillow import FEWEST, LONGEST, SMALLEST, shrink

OPERATIONS: dict[str, dict] = {
    "words_num_filter": {"min_num": FEWEST},
    "image_shrink_mapper": {},
    "image_shape_filter": {"min_width": SMALLEST, "min_height": SMALLEST},
    "image_aspect_ratio_filter": {"min_ratio": 1 / LONGEST, "max_ratio": LONGEST},
}


@OPERATORS.register_module("image_shrink_mapper")
class ImageShrinkMapper(Mapper):
    """Makes each sample's picture a JPEG of 224 px on the shorter side; samples whose picture is broken are dropped."""

    _batched_op = True

    def process_batched(self, samples: dict[str, list]) -> dict[str, list]:
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # Data-Juicer turns it on, and would store half a picture as a whole
        shrunk = [shrink(pictures[0], judge=False) for pictures in samples["image_bytes"]]
        samples["image_bytes"] = [[data] for data in shrunk]
        whole = [number for number, data in enumerate(shrunk) if data is not None]
        return {name: [values[number] for number in whole] for name, values in samples.items()}


def as_samples(table: pa.Table) -> pa.Table:
    """The columns that Data-Juicer looks for: a text, and lists of the pictures' names and bytes."""
    ones = pa.array(range(len(table) + 1), pa.int32())
    names, pictures = (pa.ListArray.from_arrays(ones, table[name].combine_chunks()) for name in ("__key__", "jpg"))
    return pa.table({"text": table["txt"].cast(pa.string()), "images": names, "image_bytes": pictures})


def curate(raw: str, out: str) -> None:
    ray.init(num_cpus=2, logging_level="ERROR", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    data = ray.data.read_webdataset(raw, decoder=None, suffixes=["jpg", "txt"])
    data = data.map_batches(as_samples, batch_format="pyarrow")
    operators = load_ops([{name: options | {"auto_op_parallelism": False}} for name, options in OPERATIONS.items()])
    RayDataset(data, auto_op_parallelism=False).process(operators).data.write_parquet(out)


if __name__ == "__main__":
    raw_folder, _, out_folder = sys.argv[1:]
    curate(raw_folder, out_folder)
