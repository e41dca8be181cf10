# Everything runs in .venv, made on first use; model and data go to ~/.cache/mops-fl (MOPS_CACHE).
# TORCH may name another build, for instance a CUDA one: make install TORCH="torch==2.11.0 --index-url ...".
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
export FLWR_TELEMETRY_ENABLED := 0

.PHONY: install fetch dolly deploy-demo test test-slow lint check bench docs clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

fetch: install
	$(BIN)/mops-fl fetch

dolly: fetch
	$(BIN)/flower-simulation --app experiments.dolly

deploy-demo: fetch
	$(BIN)/mops-fl deploy-demo

test: install
	$(BIN)/python -m pytest -q -n 2

test-slow: fetch
	MOPS_REQUIRE_MODEL=1 $(BIN)/python -m pytest -q -m slow

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

# Half an hour on two cores. Nothing else should run.
bench: fetch
	for name in step_speed step_profile round_speed cohort_rounding generate_speed first_message; do \
	  $(BIN)/python -m benchmarks.$$name --json runs/benchmarks/$$name.json || exit 1; done
	for what in memory rounds; do \
	  $(BIN)/python -m benchmarks.simulation_cost $$what --json runs/benchmarks/simulation_$$what.json || exit 1; done
	$(BIN)/python -m benchmarks.table runs/benchmarks/*.json

# API reference from the docstrings, into build/docs.
docs: install
	$(BIN)/python -W ignore -m pdoc --docformat google --output-directory build/docs mops_fl partitioning clients strategies experiments

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build *.egg-info
