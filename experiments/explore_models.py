"""The models that `mops-fl explore` puts side by side: each run's, and their backbone alone, on one copy of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from experiments.plots import run_labels
from experiments.run_folder import RunFolder
from mops_fl.adapter_folder import RUN_ADAPTER, AdapterDescription, SavedAdapter, load_adapter
from mops_fl.errors import InputError
from mops_fl.weights import initial_weights

if TYPE_CHECKING:
    from mops_fl.mops_model import MopsModel

BARE = "bare model"


class Exhibit(NamedTuple):
    """A model, what to call it, and the run it is from; None for the bare model."""

    label: str
    model: MopsModel
    run: RunFolder | None


def short_labels(runs: Sequence[RunFolder]) -> list[str]:
    """A name for each run, no two alike, with the seed only where seeds differ."""
    return run_labels(runs, with_seed=len({run.config.get("seed") for run in runs}) > 1)


def require_one_backbone(runs: Sequence[RunFolder]) -> None:
    """Refuse runs that were trained on different models, before any is loaded.

    Raises:
        InputError: they were, or one has no readable adapter.
    """
    first, *others = (load_adapter(run.path / RUN_ADAPTER).description for run in runs)
    for run, other in zip(runs[1:], others, strict=True):
        if _backbone_key(other) != _backbone_key(first):
            raise InputError(
                f"{runs[0].path} was trained on {_backbone_text(first)}, {run.path} on {_backbone_text(other)}; "
                "explore only runs of one backbone together."
            )


def load_exhibits(runs: Sequence[RunFolder], backbone: str | None, device: str, dtype: str) -> list[Exhibit]:
    """The bare model and the model of each run; the backbone, which must be all runs', is in memory once.

    Raises:
        InputError: see `MopsModel.from_pretrained`.
    """
    from mops_fl.mops_model import MopsModel  # slow to import, and not needed to refuse a wrong value

    first = MopsModel.from_pretrained(runs[0].path, backbone, device, dtype)
    models = [first, *(MopsModel(first.backbone, load_adapter(run.path / RUN_ADAPTER)) for run in runs[1:])]
    trained = [Exhibit(*parts) for parts in zip(short_labels(runs), models, runs, strict=True)]
    return [Exhibit(BARE, bare_model(first), None), *trained]


def bare_model(model: MopsModel) -> MopsModel:
    """The backbone of `model` under LoRA that was never trained, which adds exactly zero to what it computes."""
    description = replace(model.description, adapter=replace(model.description.adapter, method="lora"), experts=())
    arrays = initial_weights(model.backbone, description.adapter, torch.Generator())
    saved = SavedAdapter(description, {name: array.numpy() for name, array in arrays.items()}, card="")
    return type(model)(model.backbone, saved)


def _backbone_key(description: AdapterDescription) -> tuple[str, ...]:
    backbone = description.backbone
    return description.backbone_sha256, backbone.quantization, backbone.gate_embedding


def _backbone_text(description: AdapterDescription) -> str:
    backbone = description.backbone
    changes = [change for change in (backbone.compression, backbone.quantization) if change != "none"]
    looks_at = f"gate looks at {backbone.gate_embedding}"
    sha256 = f"weights of SHA-256 {description.backbone_sha256[:12]}"
    return f"{Path(backbone.backbone).name} ({', '.join([*changes, looks_at, sha256])})"
