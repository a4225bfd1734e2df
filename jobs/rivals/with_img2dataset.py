"""img2dataset in two processes, from a server of its own on loopback.

    .rivals/img2dataset/bin/python jobs/rivals/with_img2dataset.py RAW_FOLDER --out FOLDER

What the job does not ask for, hashes and EXIF, is off. The last line on standard output is {"excluded_cpu_s": …}: the
CPU seconds of the server, which stands for the web and is no part of the work.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

SIDE, SMALLEST, LONGEST = 224, 128, 3.0
PROCESSES, THREADS, SHARD = 2, 16, 1000


def curate(raw: str, out: str) -> float:
    """Returns the server's CPU seconds."""
    from img2dataset import download

    with TemporaryDirectory() as folder:
        listed = f"{folder}/pictures.parquet"
        command = [sys.executable, str(Path(__file__).with_name("picture_server.py")), raw, listed]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        pictures = int(server.stdout.readline())
        download(
            url_list=listed,
            input_format="parquet",
            url_col="url",
            caption_col="caption",
            save_additional_columns=["sample"],
            output_folder=out,
            output_format="parquet",
            # a shard goes to one process, and a process is replaced after five of them: few, but one for each
            number_sample_per_shard=min(SHARD, -(-pictures // PROCESSES)),
            processes_count=PROCESSES,
            thread_count=THREADS,
            image_size=SIDE,
            resize_mode="keep_ratio",
            resize_only_if_bigger=True,
            encode_quality=90,
            min_image_size=SMALLEST,
            max_aspect_ratio=LONGEST,
            extract_exif=False,
            compute_hash=None,
        )
        return float(server.communicate()[0])


if __name__ == "__main__":
    raw_folder, _, out_folder = sys.argv[1:]
    print(json.dumps({"excluded_cpu_s": curate(raw_folder, out_folder)}))
