"""Benchmarks are run by hand; here is only seen that each of them can be started."""

import importlib
from pathlib import Path

BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


def test_benchmarks_can_be_imported():
    failed = []
    for path in BENCHMARKS:
        try:
            importlib.import_module(f"benchmarks.{path.stem}")
        except Exception as error:
            failed.append(f"{path.name}: {error!r}")
    assert BENCHMARKS
    assert not failed, "\n".join(failed)
