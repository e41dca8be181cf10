"""Checkpoints: a run's state after a round, one safetensors file each, written in one step.

Each carries the checksum of everything in it: a file that a failing disk or a torn copy has changed is noticed, named
and passed over for the one before.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from experiments.durable import write_durably, writing
from mops_fl.errors import InputError
from mops_fl.payload import Arrays

logger = logging.getLogger(__name__)

_KEPT = 2
_ADAPTER, _FROZEN, _OPTIMIZER = "adapter/", "frozen/", "optimizer/"
_PROGRESS, _ORDER, _CHECKSUM = "progress", "order", "sha256"

CHECKPOINTS = "checkpoints"


@dataclass
class Progress:
    """What a run has done and cost so far, over all its processes.

    Attributes:
        rounds_done: complete rounds.
        client_steps: optimiser steps of all clients together.
        train_seconds: time spent in rounds of training.
        elapsed_seconds: time since the run began, without the pauses between its processes.
        num_tokens: tokens that carried loss in training.
        bytes_up: arrays received from clients.
        bytes_down: arrays sent to clients.
        failures: replies that failed, were refused or never came.
        failures_by_client: of those how many were each client's, by its partition id.
        evaluations_missing: clients that did not measure when asked to, each time counted.
        perplexity_bare: of the backbone without prompts, per task and `all`.
        perplexity_before: before round 1.
        perplexity: last measured.
    """

    rounds_done: int = 0
    client_steps: int = 0
    train_seconds: float = 0.0
    elapsed_seconds: float = 0.0
    num_tokens: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    failures: int = 0
    failures_by_client: dict[str, int] = field(default_factory=dict)
    evaluations_missing: int = 0
    perplexity_bare: dict[str, float] = field(default_factory=dict)
    perplexity_before: dict[str, float] = field(default_factory=dict)
    perplexity: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """Everything the next round needs.

    Attributes:
        adapter: the global adapter, name -> float32.
        frozen: what else is sent, which never changes: see `clients.setting.Start`.
        progress: what has been done.
        optimizer: the state of an optimiser that lives from round to round; empty in a federation.
    """

    adapter: Arrays
    frozen: Arrays
    progress: Progress
    optimizer: Arrays = field(default_factory=dict)


def save_checkpoint(run: Path, checkpoint: Checkpoint) -> None:
    """Write a round's checkpoint and drop all but the newest two.

    Raises:
        RunError: it cannot be written.
    """
    folder = run / CHECKPOINTS
    target = folder / f"round-{checkpoint.progress.rounds_done:06d}.safetensors"
    parts = {_ADAPTER: checkpoint.adapter, _FROZEN: checkpoint.frozen, _OPTIMIZER: checkpoint.optimizer}
    tensors = {
        prefix + name: np.asarray(array, order="C") for prefix, part in parts.items() for name, array in part.items()
    }
    progress = json.dumps(asdict(checkpoint.progress))
    # A file of tensors does not keep their order, on which sums over all of them depend to the last bit.
    metadata = {_PROGRESS: progress, _ORDER: json.dumps(list(tensors)), _CHECKSUM: _checksum(tensors, progress)}
    with writing(folder):
        folder.mkdir(exist_ok=True)
    write_durably(target, save(tensors, metadata))
    with writing(folder):
        for old in sorted(folder.glob("round-*.safetensors"))[:-_KEPT]:
            old.unlink()


def load_checkpoint(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run that can be read; a corrupt one is named and passed over.

    Returns:
        None if the run was cut off before it had written any.

    Raises:
        InputError: there are some, but all of them are corrupt.
    """
    paths = sorted((run / CHECKPOINTS).glob("round-*.safetensors"), reverse=True)
    for path in paths:
        try:
            return _read(path)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("The checkpoint %s is corrupt (%s); the one before it is used.", path, error)
    if paths:
        raise InputError(f"{run} has no readable checkpoint; start the run anew.")
    return None


def _read(path: Path) -> Checkpoint:
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        tensors: dict[str, Any] = {name: file.get_tensor(name) for name in json.loads(metadata[_ORDER])}
    if metadata[_CHECKSUM] != _checksum(tensors, metadata[_PROGRESS]):
        raise ValueError("its checksum is another")
    adapter, frozen, optimizer = (_with_prefix(tensors, prefix) for prefix in (_ADAPTER, _FROZEN, _OPTIMIZER))
    return Checkpoint(adapter, frozen, Progress(**json.loads(metadata[_PROGRESS])), optimizer)


def _checksum(tensors: Mapping[str, Any], progress: str) -> str:
    digest = hashlib.sha256(progress.encode())
    for name, array in tensors.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _with_prefix(tensors: Mapping[str, Any], prefix: str) -> Arrays:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
