"""Benchmarks are run by hand; here is only seen that each of them can be started."""

import importlib
from pathlib import Path


def test_every_benchmark_can_be_imported():
    for path in (Path(__file__).parents[1] / "benchmarks").glob("*.py"):
        importlib.import_module(f"benchmarks.{path.stem}")
