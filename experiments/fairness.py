"""What runs differ in though a fair comparison holds it equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from experiments.measurements import perplexity_rows
from experiments.run_folder import ALL_TASKS, RunFolder
from experiments.wording import count_text, perplexity_text
from mops_fl.config import OWN_EMBEDDING, PROMPTED

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
# What two methods of soft prompts share; runs of one method that differ in it are a study, whose columns say so.
PROMPTS = ("inject-layer", "prompt-init", "input-prompts", "input-prompt-steps", "input-prompt-lr")
# The bare model gives the same perplexity on the same rows, up to the machine's rounding.
BARE_TOLERANCE = 0.01


def unfair_differences(runs: Sequence[RunFolder]) -> list[str]:
    """Each thing that differs with its values, such as `skew (15.0 / 1.0)`; a key that a run lacks is passed over."""
    results, configs = [run.results() for run in runs], [run.config for run in runs]
    figures: dict[str, list[object]] = {
        "client steps": [count_text(result.get("client_steps")) for result in results],
        "training": [result.get("training", "federated") for result in results],
        "status": [result.get("status", "complete") for result in results],
        **_values(configs, (*DEALT, *STEPS)),
    }
    return [*_told_apart(figures), *measured_differences(runs), *_differing_terms(configs)]


def measured_differences(runs: Sequence[RunFolder]) -> list[str]:
    """Likewise, of that alone on which the perplexity is measured: weights, their precision, and rows.

    The model without prompts has one perplexity on all of it, so that it tells of what nobody recorded.
    """
    results, configs = [run.results() for run in runs], [run.config for run in runs]
    figures = _values(results, ("quantization", "dtype")) | {"dataset": [_dataset(result) for result in results]}
    differing = _told_apart(figures)
    differing += [f"{name} ({values})" for name, values in _differing_weights(results, configs)]
    rows = [result.get("data_sha256") for result in results]
    if measured := [*_by_hash("data_sha256", rows, ROWS, configs), *_by_key(configs, MEASURED)]:
        differing.append(f"rows ({', '.join(f'{name} {values}' for name, values in measured)})")
    return differing or _differing_bare_model(results)


def _differing_terms(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What one method has and another has not that it is compared with: other prompts, other seeds, the answer."""
    methods = list(dict.fromkeys(config.get("method") for config in configs))
    if len(methods) < 2:
        return []
    differing = []
    prompted = [_with_prompts(config) for config in configs if config.get("method") in PROMPTED]
    for key in ("prompts", *PROMPTS):
        known = [config for config in prompted if key in config]
        if len({config["method"] for config in known}) > 1:
            differing += [f"{name} ({values})" for name, values in _by_key(known, (key,))]
    seeds = [{config.get("seed") for config in configs if config.get("method") == method} for method in methods]
    if any(first.isdisjoint(second) for first, second in combinations(seeds, 2)):
        differing.append(f"seeds ({' / '.join(', '.join(sorted(map(str, of))) for of in seeds)})")
    if any(config.get("method") == "mops" and config.get("pooling") == "all" for config in configs):
        differing.append("pooling (all lets the answer's tokens into the gate)")
    return differing


def _with_prompts(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with the number of prompts, if it tells."""
    experts, of_each = config.get("num-experts"), config.get("prompts-per-expert")
    return {**config, "prompts": experts * of_each} if experts and of_each else config


def _differing_weights(
    results: Sequence[Mapping[str, Any]], configs: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """A hash over the backbone and another model, which reads for the gate, says nothing beside one of the backbone."""
    readers = [config.get("gate-embedding", OWN_EMBEDDING) for config in configs]
    alike = len(set(readers)) == 1
    hashes = [
        result.get("backbone_sha256") if alike or reader == OWN_EMBEDDING else None
        for result, reader in zip(results, readers, strict=True)
    ]
    return _by_hash("backbone_sha256", hashes, WEIGHTS, configs)


def _by_hash(
    name: str, hashes: Sequence[str | None], keys: Sequence[str], configs: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """The keys that differ, with their values; none if all have the same hash, the hashes if only they differ."""
    if len(set(hashes)) == 1 and hashes[0]:
        return []
    recorded = [value for value in hashes if value]
    if (differing := _by_key(configs, keys)) or len(set(recorded)) < 2:
        return differing
    return [(name, _listed([value[:8] for value in recorded]))]


def _by_key(configs: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[tuple[str, str]]:
    return [(key, _listed(values)) for key, values in _values(configs, keys).items() if len(set(values)) > 1]


def _differing_bare_model(results: Sequence[dict[str, Any]]) -> list[str]:
    bare = [row.bare for result in results for row in perplexity_rows(result)
            if row.task == ALL_TASKS and row.bare is not None]  # fmt: skip
    if bare and max(bare) > (1 + BARE_TOLERANCE) * min(bare):
        return [f"perplexity of the bare model ({_listed([perplexity_text(value) for value in bare])})"]
    return []


def _told_apart(figures: Mapping[str, Sequence[object]]) -> list[str]:
    return [f"{name} ({_listed(values)})" for name, values in figures.items() if len(set(values)) > 1]


def _values(mappings: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, list[object]]:
    return {key: [mapping[key] for mapping in mappings if key in mapping] for key in keys}


def _dataset(result: Mapping[str, Any]) -> str:
    name = str(result.get("dataset"))
    return f"{name}, bundled sample" if result.get("data_is_sample") else name


def _listed(values: Sequence[object]) -> str:
    return " / ".join(str(value) or "''" for value in dict.fromkeys(values))
