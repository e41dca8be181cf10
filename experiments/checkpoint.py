"""Checkpoints: the federation's state after a round, one safetensors file each, written in one step."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mops_fl.errors import InputError

logger = logging.getLogger(__name__)

_KEPT = 2
_ADAPTER, _FROZEN = "adapter/", "frozen/"

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
    perplexity_bare: dict[str, float] = field(default_factory=dict)
    perplexity_before: dict[str, float] = field(default_factory=dict)
    perplexity: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """Everything the next round needs.

    Attributes:
        adapter: the global adapter, name -> float32.
        frozen: the input prompts.
        progress: what has been done.
    """

    adapter: Mapping[str, NDArray[np.float32]]
    frozen: Mapping[str, NDArray[np.float32]]
    progress: Progress


def save_checkpoint(run: Path, checkpoint: Checkpoint) -> None:
    """Write a round's checkpoint and drop all but the newest two."""
    folder = run / CHECKPOINTS
    folder.mkdir(exist_ok=True)
    target = folder / f"round-{checkpoint.progress.rounds_done:06d}.safetensors"
    tensors = {_ADAPTER + name: np.ascontiguousarray(array) for name, array in checkpoint.adapter.items()}
    tensors |= {_FROZEN + name: np.ascontiguousarray(array) for name, array in checkpoint.frozen.items()}
    temporary = target.with_suffix(".partial")
    save_file(tensors, temporary, metadata={"progress": json.dumps(asdict(checkpoint.progress))})
    temporary.replace(target)
    for old in sorted(folder.glob("round-*.safetensors"))[:-_KEPT]:
        old.unlink()


def load_checkpoint(run: Path) -> Checkpoint:
    """The newest checkpoint of a run that can be read; a corrupt one is named and passed over.

    Raises:
        InputError: there is none.
    """
    for path in sorted((run / CHECKPOINTS).glob("round-*.safetensors"), reverse=True):
        try:
            return _read(path)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("The checkpoint %s is corrupt (%s); the one before it is used.", path, error)
    raise InputError(f"{run} has no readable checkpoint; start the run anew.")


def _read(path: Path) -> Checkpoint:
    with safe_open(path, framework="numpy") as file:
        tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        progress = Progress(**json.loads(file.metadata()["progress"]))
    return Checkpoint(_with_prefix(tensors, _ADAPTER), _with_prefix(tensors, _FROZEN), progress)


def _with_prefix(tensors: Mapping[str, Any], prefix: str) -> dict[str, NDArray[np.float32]]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
