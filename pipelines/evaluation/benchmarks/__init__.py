"""The benchmarks, one small file each: `read(folder)` gives the questions, `VERSION` names prompt and metric."""

from pipelines.evaluation.benchmarks import picture_world

BENCHMARKS = {"picture_world": picture_world}
