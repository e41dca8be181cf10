"""A trained adapter on disk: `adapter.safetensors` and `adapter_config.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from mops_fl.errors import InputError

FORMAT_VERSION = 1
_TENSORS, _CONFIG = "adapter.safetensors", "adapter_config.json"

Arrays = Mapping[str, NDArray[np.float32]]


def save_adapter(folder: Path, arrays: Arrays, config: Mapping[str, Any]) -> None:
    """Write an adapter.

    Args:
        folder: made if it is not there; files of an earlier adapter are replaced.
        arrays: everything a forward pass needs beside the backbone: the adapter and the input prompts.
        config: how to read them: backbone, method, layer, readings, experts.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(exist_ok=True)
    tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    (folder / _TENSORS).write_bytes(save(tensors))
    description = {"format-version": FORMAT_VERSION, **config}
    (folder / _CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load_adapter(folder: Path) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
    """Read an adapter: its arrays and its config.

    Raises:
        InputError: a file is missing or corrupt, or of another format version.
    """
    try:
        config: dict[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        arrays = load_file(folder / _TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} holds no readable adapter ({error}); train or copy it again.") from error
    if not isinstance(config, dict):
        raise InputError(f"{folder / _CONFIG} holds no JSON object; train or copy the adapter again.")
    if config.get("format-version") != FORMAT_VERSION:
        raise InputError(
            f"{folder} has format version {config.get('format-version')}, this software reads {FORMAT_VERSION}; "
            "use the software that wrote it."
        )
    return arrays, config
