"""Benchmarks are run by hand; here is only seen that each of them can be started."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", [path.stem for path in BENCHMARKS])
def test_a_benchmark_can_be_imported(name):
    importlib.import_module(f"benchmarks.{name}")
