"""Where pruned backbones lie on this machine, and how a run finds its own.

`mops-fl compress` makes them, once; a run only looks them up, since pruning takes minutes and would happen on every
machine of a federation. The cache holds one folder for each: `compressed/<model>-<recipe>-<key>/`. The key is a hash
of the model, the calibration tokens, the recipe and the versions that matter. A run names the model and the recipe and
takes what was calibrated on its own server's rows, or it names one by its key, as in `sparsegpt:75%@1a2b`. A folder can
be copied to another machine: into the same place, or anywhere, named in `backbone`.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mops_fl.config import OWN_EMBEDDING, BackboneConfig
from mops_fl.data import Row, TaskData
from mops_fl.errors import InputError
from mops_fl.recipe import PruningRecipe
from mops_fl.sources import RECEIPT, cache_dir, cached_model_path, file_sha256, read_receipt, resolve_backbone

COMPRESSION_RECEIPT = "mops-compression.json"


class NotPrunedError(InputError):
    """The dense model is there, the pruned one is not, or not for the run's data."""


class SeveralPrunedError(InputError):
    """The recipe made several models; the run's data may tell which is meant."""


def resolve_model(config: BackboneConfig) -> Path:
    """The folder that holds the backbone as configured: dense, or pruned by its recipe.

    Raises:
        NotPrunedError: there is none; says the command that makes it.
        SeveralPrunedError: there are several.
        InputError: a folder is named that was pruned in another way than the config says.
    """
    own = read_compression_receipt(Path(config.backbone).expanduser())
    if own:
        if _is_made_by(own, config.compression):
            return Path(config.backbone).expanduser()
        raise InputError(f"{config.backbone} is pruned by {own['recipe']}; set `compression` to that.")
    if config.compression == "none":
        return resolve_backbone(config.backbone)
    found = _find_pruned(config)
    recipe = PruningRecipe.parse(config.compression)
    if not found:
        raise NotPrunedError(
            f"{config.backbone} pruned by {config.compression} is not in the cache {cache_dir()}: "
            f"run `mops-fl compress --backbone {config.backbone} --recipe {recipe}`."
        )
    if len(found) > 1:
        raise SeveralPrunedError(
            f"{config.backbone} was pruned by {recipe} more than once; set `compression` to one of: "
            f"{_names(recipe, found)}."
        )
    return next(iter(found))


def calibrated_on(data: TaskData, config: BackboneConfig) -> BackboneConfig:
    """The config, naming by its key the one model of its recipe that was calibrated on rows of this server's.

    A config that names a key or a pruned folder is left as it is, and so is any on a machine without the server's rows.

    Raises:
        NotPrunedError: there are models of the recipe, but all were calibrated on other rows.
    """
    found = _find_pruned(config)
    if (
        not found
        or not data.server
        or Path(config.backbone).expanduser() in found
        or PruningRecipe.parse(config.compression).key
    ):
        return config
    servers = {row.sha256 for row in data.server}
    own = [receipt["key"] for receipt in found.values() if servers.issuperset(_calibration_rows(receipt))]
    if not own:
        recipe = PruningRecipe.parse(config.compression)
        raise NotPrunedError(
            f"{config.backbone} was pruned by {recipe} on other rows than those of this run's server: run `mops-fl "
            f"compress --backbone {config.backbone} --recipe {recipe}` with this run's data and --run-config, or set "
            f"`compression` to what is there: {_names(recipe, found)}."
        )
    return _by_key(config, own[0]) if len(own) == 1 else config


def prefer_with_weights(sha256: str, config: BackboneConfig) -> BackboneConfig:
    """The config, naming by its key the one model among several of its recipe with this `backbone_sha256`."""
    found = _find_pruned(config)
    if len(found) < 2:
        return config
    named = [_by_key(config, receipt["key"]) for receipt in found.values()]
    return next((one for one in named if backbone_sha256(one) == sha256), config)


def require_not_calibrated_on(rows: Iterable[Row], config: BackboneConfig) -> None:
    """Refuse a pruned backbone that has seen rows it is to be measured on; a receipt that names no rows is believed.

    Raises:
        InputError: it was calibrated on some of them.
    """
    receipt = read_compression_receipt(resolve_model(config))
    seen = _calibration_rows(receipt)
    if seen_rows := [row for row in rows if row.sha256 in seen]:
        raise InputError(
            f"{config.backbone} pruned by {receipt['recipe']}@{receipt['key']} was calibrated on {len(seen_rows)} of "
            "the rows that are to be measured on; prune it on this run's own data, with `mops-fl compress`."
        )


def compressed_path(backbone: str, recipe: PruningRecipe, key: str) -> Path:
    """The folder in the cache that holds (or would hold) one compressed model."""
    model = Path(backbone).name
    slug = str(recipe).replace(":", "-").removesuffix("%")
    return cache_dir() / "compressed" / f"{model}-{slug}-{key}"


def fingerprint(folder: Path) -> str:
    """What tells a dense model from another: its receipt, or, for a folder of the user's own, a hash of its files.

    Raises:
        InputError: the weights are not in safetensors.
    """
    receipt = read_receipt(folder / RECEIPT)
    if receipt:
        return " ".join(receipt[name] for name in ("name", "source", "revision", "sha256") if name in receipt)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise _without_weights(folder)
    digest = hashlib.sha256()
    for path in (folder / "config.json", *weights):
        digest.update(bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()


def backbone_sha256(config: BackboneConfig) -> str:
    """SHA-256 of all frozen weights: the backbone's own or, where another network reads for the gate, of both hashes.

    Raises:
        InputError: one of the two is not there, or its weights are not in safetensors.
    """
    own = weights_sha256(resolve_model(config))
    if config.gate_embedding == OWN_EMBEDDING:
        return own
    return hashlib.sha256(f"{own} {weights_sha256(resolve_backbone(config.gate_embedding))}".encode()).hexdigest()


def weights_sha256(folder: Path) -> str:
    """SHA-256 over the name, dtype, shape and bytes of every weight, however many files they are spread over.

    Raises:
        InputError: the weights are not in safetensors.
    """
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in folder.glob("*.safetensors")]
        holders = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        if not holders:
            raise _without_weights(folder)
        for name in sorted(holders):
            weight = holders[name].get_tensor(name)
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} ".encode())
            digest.update(weight.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _without_weights(folder: Path) -> InputError:
    return InputError(f"{folder} has no weights in safetensors; save the model in that format.")


def read_compression_receipt(folder: Path) -> dict[str, Any]:
    """What `mops-fl compress` wrote beside the weights; empty if the folder is none of its."""
    return read_receipt(folder / COMPRESSION_RECEIPT)


def _calibration_rows(receipt: dict[str, Any]) -> set[str]:
    """The `Row.sha256` of the rows that the pruning saw; none of a dense model and of a receipt that names none."""
    return set(receipt.get("calibration", {}).get("rows-sha256", ()))


def _by_key(config: BackboneConfig, key: str) -> BackboneConfig:
    return replace(config, compression=f"{PruningRecipe.parse(config.compression)}@{key}")


def _names(recipe: PruningRecipe, found: Mapping[Path, Mapping[str, Any]]) -> str:
    """What `compression` may be set to for each one of what was found."""
    return ", ".join(f"{recipe}@{receipt['key']}" for receipt in found.values())


def _find_pruned(config: BackboneConfig) -> dict[Path, dict[str, Any]]:
    """The folders in the cache that hold the backbone pruned as configured, with their receipts."""
    if config.compression == "none":
        return {}
    return {
        folder: receipt
        for folder in sorted((cache_dir() / "compressed").glob("*"))
        if (receipt := read_compression_receipt(folder))
        and _is_made_by(receipt, config.compression)
        and _is_made_from(receipt, config.backbone)
    }


def _is_made_by(receipt: dict[str, Any], compression: str) -> bool:
    if compression == "none":
        return False
    recipe = PruningRecipe.parse(compression)
    return bool(receipt["recipe"] == str(recipe) and receipt["key"].startswith(recipe.key))


def _is_made_from(receipt: dict[str, Any], backbone: str) -> bool:
    """By the dense model's fingerprint; where there is no dense model, as on a device, by its name."""
    dense = Path(backbone).expanduser()
    dense = dense if dense.is_dir() else cached_model_path(backbone)
    if dense.is_dir():
        return bool(receipt["fingerprint"] == fingerprint(dense))
    return bool(receipt["backbone"] == backbone)
