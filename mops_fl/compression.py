"""Prune a backbone once, into the cache, and measure what it cost.

Calibration rows are the server's, which are neither a client's nor the test's. Embeddings and head stay dense; the
pruned model is stored in the dtype that the dense one came in.
"""

import dataclasses
import hashlib
import importlib.util
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mops_fl.backbone import Backbone
from mops_fl.compressed import COMPRESSION_RECEIPT, compressed_path, fingerprint, read_compression_receipt
from mops_fl.config import OWN_EMBEDDING, BackboneConfig, DataConfig
from mops_fl.data import Row, TaskData
from mops_fl.encoding import EncodedRow, RowEncoder
from mops_fl.errors import InputError
from mops_fl.evaluation import evaluate_bare
from mops_fl.fetch import staged
from mops_fl.pruning import Progress, decoder_linears, prune
from mops_fl.recipe import PruningRecipe
from mops_fl.sources import resolve_backbone

MEASURED_ROWS = 35
VERSIONS_THAT_MATTER = ("llmcompressor", "torch", "transformers")


@dataclass(frozen=True)
class Calibration:
    """What the pruning sees.

    Attributes:
        num_rows: rows of the server's.
        max_length: most tokens of each.
    """

    num_rows: int
    max_length: int


def compress(
    backbone: str,
    recipe: PruningRecipe,
    data: TaskData,
    data_config: DataConfig,
    calibration: Calibration,
    progress: Progress,
) -> Path:
    """Prune the backbone, or return at once what the same inputs have made before.

    Args:
        backbone: hub id of a fetched model, or a local folder.
        recipe: how; its key is not looked at.
        data: of which only the server's rows are used, to calibrate and, others of them, to measure.
        data_config: how rows become tokens when perplexity is measured.
        calibration: how many rows are calibrated on, and how long they may be.
        progress: told what goes on, one line at a time.

    Returns:
        A folder in the cache, for `from_pretrained`, with a receipt in `COMPRESSION_RECEIPT`.

    Raises:
        InputError: no such model, or a pruned one; llmcompressor is not installed; the server has too few rows; the
            model has experts; or a matrix does not divide into the recipe's groups.
    """
    _require_llmcompressor()
    folder = resolve_backbone(backbone)
    if read_compression_receipt(folder):
        raise InputError(f"{backbone} is pruned already; give the dense model.")
    calibration_rows, measured_rows = split_server_rows(data, calibration.num_rows)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    long_config = dataclasses.replace(data_config, max_length=calibration.max_length)
    token_ids = [row.token_ids for row in _encode(tokenizer, long_config, data.tasks, calibration_rows)]
    dense = fingerprint(folder)
    key = compression_key(dense, recipe, token_ids)
    target = compressed_path(backbone, recipe, key)
    if read_compression_receipt(target):
        return target

    measured = _encode(tokenizer, data_config, data.tasks, measured_rows)
    before = _perplexity(folder, measured, data.tasks)
    progress(f"dense: perplexity {before:.2f} on {len(measured)} rows of the server's that are not calibrated on")
    with staged(target, COMPRESSION_RECEIPT) as scratch:
        started = time.monotonic()
        weights, warnings = prune(folder, tokenizer, recipe, token_ids, progress)
        seconds = time.monotonic() - started
        model = _with_weights(folder, weights)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        after = _perplexity(scratch, measured, data.tasks)
        progress(f"pruned: perplexity {after:.2f} on the same rows, after {seconds:.0f} s")
        receipt = {
            "key": key,
            "recipe": str(recipe),
            "backbone": backbone,
            "fingerprint": dense,
            "versions": {name: version(name) for name in VERSIONS_THAT_MATTER},
            "calibration": _describe_calibration(data, data_config, calibration, calibration_rows, token_ids),
            "perplexity": {"before": before, "after": after, "rows": len(measured)},
            "seconds": round(seconds, 1),
            "warnings": warnings,
            **inspect_weights(model, recipe),
        }
        (scratch / COMPRESSION_RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
    return target


def split_server_rows(data: TaskData, num_calibration: int) -> tuple[list[Row], list[Row]]:
    """Rows to calibrate on and rows to measure on, all of them the server's, each spread evenly over the tasks.

    Raises:
        InputError: the server has too few rows for both.
    """
    by_task = [[row for row in data.server if row.task == task] for task in data.tasks]
    spread = [row for rank in zip_longest(*by_task) for row in rank if row is not None]
    if not 0 < num_calibration < len(spread):
        raise InputError(
            f"{num_calibration} calibration rows are asked for and the server has {len(spread)}; "
            "choose at least 1 and fewer than it has, the others are measured on."
        )
    return spread[:num_calibration], spread[num_calibration : num_calibration + MEASURED_ROWS]


def compression_key(backbone_fingerprint: str, recipe: PruningRecipe, calibration: Sequence[Tensor]) -> str:
    """12 hexadecimal characters that differ wherever the pruned weights may."""
    parts = [backbone_fingerprint, str(recipe), *(version(name) for name in VERSIONS_THAT_MATTER)]
    parts += [str(token_ids.tolist()) for token_ids in calibration]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def inspect_weights(model: nn.Module, recipe: PruningRecipe) -> dict[str, Any]:
    """What the weights themselves say of the pruning.

    Returns:
        `sparsity` of all pruned matrices together; `bytes` of the whole model: `dense` as it is stored, `sparse` as
        it would be if each pruned matrix were its other weights and a bit for each place; `layers`: the sparsity of
        each matrix and, for a recipe of groups, in `pattern` whether every group has its zeros (a weight that was
        zero before may add one).
    """
    layers: dict[str, dict[str, float | bool]] = {}
    num_weights = num_zeros = saved_bytes = 0
    for name, linear in decoder_linears(model).items():
        zeros = linear.weight == 0
        layers[name] = {"sparsity": zeros.float().mean().item()}
        if recipe.group is not None:
            zeros_in_group, size = recipe.group
            layers[name]["pattern"] = bool((zeros.unflatten(1, (-1, size)).sum(2) >= zeros_in_group).all())
        num_weights += zeros.numel()
        num_zeros += int(zeros.sum())
        saved_bytes += int(zeros.sum()) * linear.weight.element_size() - zeros.numel() // 8
    dense_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return {
        "sparsity": num_zeros / num_weights,
        "bytes": {"dense": dense_bytes, "sparse": dense_bytes - saved_bytes},
        "layers": layers,
    }


def _describe_calibration(
    data: TaskData,
    data_config: DataConfig,
    calibration: Calibration,
    rows: Sequence[Row],
    token_ids: Sequence[Tensor],
) -> dict[str, Any]:
    return {
        "data": data.description,
        "dataset": data_config.dataset,
        "data-sha256": data.sha256,
        "rows": len(rows),
        "tokens": sum(map(len, token_ids)),
        "max-length": calibration.max_length,
        "rows-sha256": [row.sha256 for row in rows],
    }


def _require_llmcompressor() -> None:
    if importlib.util.find_spec("llmcompressor") is None:
        raise InputError("Pruning needs llmcompressor, which is not installed: pip install 'mops-fl[compress]'.")


def _encode(tokenizer: Any, config: DataConfig, tasks: tuple[str, ...], rows: list[Row]) -> list[EncodedRow]:  # noqa: ANN401
    encoder = RowEncoder(tokenizer, config, tasks)
    return [encoder.encode(row) for row in rows]


def _perplexity(folder: Path, rows: list[EncodedRow], tasks: tuple[str, ...]) -> float:
    """Of the model in `folder` without prompts, in the dtype that runs take on this machine."""
    backbone = Backbone.load(
        BackboneConfig(str(folder), compression="none", quantization="none", dtype="auto", gate_embedding=OWN_EMBEDDING)
    )
    return evaluate_bare(backbone, rows, tasks).perplexity()["all"]


@torch.no_grad()
def _with_weights(folder: Path, weights: dict[str, Tensor]) -> Any:  # noqa: ANN401
    """The dense model, in the dtype it is stored in, with these weights in place of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    linears = decoder_linears(model)
    for name, weight in weights.items():
        linears[name].weight.copy_(weight)
    return model
