"""What runs differ in though a fair comparison holds it equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.report import count_text, perplexity_rows, perplexity_text
from experiments.run_folder import ALL_TASKS, RunFolder

# Config keys that choose the weights and the rows, where not every run has recorded the hash of what they came to.
WEIGHTS = ("backbone", "compression")
ROWS = ("tasks", "held-out-tasks", "data-seed", "num-rows", "test-fraction", "server-rows")
# Of the rows, those measured on, and which of their tokens count.
MEASURED = ("eval-rows", "max-length", "loss-on", "evaluate-on")
# Who trains on what, and how.
DEALT = (
    "num-clients",
    "clients-per-round",
    "partitioner",
    "skew",
    "dirichlet-alpha",
    "shards-per-client",
    "central-rows",
)
STEPS = ("local-steps", "local-epochs", "batch-size", "server-weight")
# The bare model gives the same perplexity on the same rows, up to the machine's rounding.
BARE_TOLERANCE = 0.01


def unfair_differences(runs: Sequence[RunFolder]) -> list[str]:
    """Each thing that differs with its values, such as `skew (15.0 / 1.0)`; a key that a run lacks is passed over."""
    results, configs = [run.results() for run in runs], [run.config for run in runs]
    figures: dict[str, list[object]] = {
        "client steps": [count_text(result.get("client_steps")) for result in results],
        "dataset": [_dataset(result) for result in results],
        "training": [result.get("training", "federated") for result in results],
        "status": [result.get("status", "complete") for result in results],
        **_values(results, ("quantization", "dtype")),
        **_values(configs, (*DEALT, *STEPS)),
    }
    differing = [f"{name} ({_listed(values)})" for name, values in figures.items() if len(set(values)) > 1]
    differing += [f"{name} ({values})" for name, values in _by_hash(results, "backbone_sha256", WEIGHTS, configs)]
    rows = [*_by_hash(results, "data_sha256", ROWS, configs), *_by_key(configs, MEASURED)]
    if rows:
        differing.append(f"rows ({', '.join(f'{name} {values}' for name, values in rows)})")
    elif not _recorded(results, "data_sha256"):
        differing += _differing_bare_model(results)
    return differing


def _by_hash(
    results: Sequence[Mapping[str, Any]], sha256: str, keys: Sequence[str], configs: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """The keys that differ, with their values; none if the hashes agree, the hashes if only they differ."""
    hashes = _recorded(results, sha256)
    if hashes and len(set(hashes)) == 1:
        return []
    differing = _by_key(configs, keys)
    if hashes and not differing:
        return [(sha256, _listed([value[:8] for value in hashes]))]
    return differing


def _by_key(configs: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[tuple[str, str]]:
    return [(key, _listed(values)) for key, values in _values(configs, keys).items() if len(set(values)) > 1]


def _differing_bare_model(results: Sequence[dict[str, Any]]) -> list[str]:
    """Where nobody recorded the rows, the model without prompts tells whether they are the same."""
    bare = [row.bare for result in results for row in perplexity_rows(result)
            if row.task == ALL_TASKS and row.bare is not None]  # fmt: skip
    if bare and max(bare) > (1 + BARE_TOLERANCE) * min(bare):
        return [f"perplexity of the bare model ({_listed([perplexity_text(value) for value in bare])})"]
    return []


def _recorded(results: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """A figure of every run's summary; empty unless all have it."""
    found = [str(result[name]) for result in results if result.get(name)]
    return found if len(found) == len(results) else []


def _values(mappings: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, list[object]]:
    return {key: [mapping[key] for mapping in mappings if key in mapping] for key in keys}


def _dataset(result: Mapping[str, Any]) -> str:
    name = str(result.get("dataset"))
    return f"{name}, bundled sample" if result.get("data_is_sample") else name


def _listed(values: Sequence[object]) -> str:
    return " / ".join(str(value) or "''" for value in dict.fromkeys(values))
