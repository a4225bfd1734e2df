"""The benchmarks, one small file each: what is asked, how it is scored, and where its owners publish the data."""

from importlib import import_module
from pkgutil import iter_modules

from pipelines.evaluation.benchmarks.base import Benchmark
from pipelines.settings import SettingError, refuse_unknown

SHARED = ("base", "captions")
BENCHMARKS: dict[str, Benchmark] = {
    module.name: import_module(f"{__name__}.{module.name}").BENCHMARK
    for module in iter_modules(__path__)
    if module.name not in SHARED
}
"""By their files' names."""


def named(name: str) -> Benchmark:
    """Raises SettingError for a name that is none, with the nearest one. "MM-Vet" and "mmvet" are mm_vet, too."""
    spoken = {plain(known): known for known in BENCHMARKS}
    name = spoken.get(plain(name), name)
    if name not in BENCHMARKS:
        try:
            refuse_unknown(name, name, BENCHMARKS)
        except SettingError as error:
            raise SettingError(str(error).replace("unknown setting", "unknown benchmark")) from None
    return BENCHMARKS[name]


def plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
