"""A trained adapter on disk: `adapter.safetensors`, `adapter_config.json`, and a model card for people.

The config says all that is needed to run the adapter and to refuse what it was not trained on: another backbone,
another template, a file that was edited. The card is not read again, other than to be saved again.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from mops_fl.config import AdapterConfig, BackboneConfig, DataConfig, read_section, to_key
from mops_fl.encoding import TEMPLATE
from mops_fl.errors import InputError
from mops_fl.payload import Arrays
from mops_fl.sources import file_sha256

FORMAT_VERSION = 2
TENSORS, CONFIG, CARD = "adapter.safetensors", "adapter_config.json", "README.md"
RUN_ADAPTER = "adapter"  # where a run's folder holds its adapter


@dataclass(frozen=True)
class AdapterDescription:
    """How an adapter is to be run, and on what.

    Attributes:
        adapter: method, shapes, layer and readings.
        backbone: the frozen model: id, how it is pruned and quantised, dtype.
        backbone_sha256: of its weights, see `mops_fl.compressed.backbone_sha256`.
        data: the rows it was trained on and how they became tokens; where the file lay is left out.
        tasks: task names.
        experts: names of the tasks that each expert was pretrained for; empty if the gate was not.
    """

    adapter: AdapterConfig
    backbone: BackboneConfig
    backbone_sha256: str
    data: DataConfig
    tasks: tuple[str, ...]
    experts: tuple[tuple[str, ...], ...]

    @property
    def expert_names(self) -> tuple[str, ...]:
        """A name for each expert: the tasks it was pretrained for, or its number, or both; empty without a gate."""
        if not self.adapter.gated:
            return ()
        names = [", ".join(tasks) for tasks in self.experts or [()] * self.adapter.num_experts]
        return tuple(
            name if name and names.count(name) == 1 else f"{name or 'expert'} {number}"
            for number, name in enumerate(names)
        )


@dataclass(frozen=True)
class SavedAdapter:
    """What an adapter's folder holds.

    Attributes:
        description: see there.
        arrays: everything a forward pass needs beside the backbone: the adapter, the input prompts, and what rows are
            routed by where no gate does it.
        card: Markdown for people; empty for none.
    """

    description: AdapterDescription
    arrays: Arrays
    card: str


def save_adapter(folder: Path, adapter: SavedAdapter) -> None:
    """Write an adapter; the folder is made, files of an earlier adapter are replaced.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(array) for name, array in adapter.arrays.items()}
    (folder / TENSORS).write_bytes(save(tensors))  # safetensors' own writing would hide why the disk refuses
    config = _to_json(adapter.description) | {"sha256": {TENSORS: file_sha256(folder / TENSORS)}}
    (folder / CONFIG).write_text(json.dumps(config | {"checksum": _checksum(config)}, indent=2) + "\n", "utf-8")
    (folder / CARD).write_text(adapter.card, encoding="utf-8")


def load_adapter(folder: Path) -> SavedAdapter:
    """Read an adapter.

    Raises:
        InputError: a file is missing, corrupt or edited, or of another format version or template.
    """
    try:
        config: Any = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        arrays = load_file(folder / TENSORS)
        card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).exists() else ""
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} holds no readable adapter ({error}); train or copy it again.") from error
    if not isinstance(config, dict):
        raise InputError(f"{folder / CONFIG} holds no JSON object; train or copy the adapter again.")
    _check_version(config, folder)
    checksum = config.pop("checksum", None)
    if checksum != _checksum(config):
        raise InputError(f"{folder / CONFIG} was edited (its checksum is another); copy the adapter again.")
    if config["sha256"] != {TENSORS: file_sha256(folder / TENSORS)}:
        raise InputError(f"{folder / TENSORS} is not the file that {CONFIG} describes; copy the adapter again.")
    if config["template"] != list(TEMPLATE):
        raise InputError(f"{folder} was trained with another template; use the software that wrote it.")
    try:
        return SavedAdapter(_from_json(config), arrays, card)
    except (InputError, KeyError) as error:
        raise InputError(
            f"{folder} was written by {config['software']}, which has other settings ({error}); use that version, or "
            "have its run write it again with `--app APP --resume RUN`."
        ) from error


def _check_version(config: Mapping[str, Any], folder: Path) -> None:
    version = config.get("format-version")
    if version == 1:
        raise InputError(
            f"{folder} has format version 1, which does not tell on which weights it was trained; have its run write "
            "it again with `--app APP --resume RUN`."
        )
    if version != FORMAT_VERSION:
        raise InputError(
            f"{folder} has format version {version}, this software reads {FORMAT_VERSION}; "
            "use the software that wrote it."
        )


def _to_json(description: AdapterDescription) -> dict[str, Any]:
    data = _table(description.data)
    del data["data-path"]
    return {
        "format-version": FORMAT_VERSION,
        "software": f"mops-fl {metadata.version('mops-fl')}",
        "adapter": _table(description.adapter),
        "backbone": {**_table(description.backbone), "sha256": description.backbone_sha256},
        "data": data,
        "template": list(TEMPLATE),
        "tasks": list(description.tasks),
        "experts": [list(tasks) for tasks in description.experts],
    }


def _from_json(config: Mapping[str, Any]) -> AdapterDescription:
    return AdapterDescription(
        adapter=read_section(AdapterConfig, config["adapter"]),
        backbone=read_section(BackboneConfig, config["backbone"]),
        backbone_sha256=config["backbone"]["sha256"],
        data=read_section(DataConfig, {**config["data"], "data-path": ""}),
        tasks=tuple(config["tasks"]),
        experts=tuple(tuple(tasks) for tasks in config["experts"]),
    )


def _table(section: Any) -> dict[str, Any]:  # noqa: ANN401
    return {to_key(name): value for name, value in asdict(section).items()}


def _checksum(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
