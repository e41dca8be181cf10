"""Where the backbone model and the data lie on this machine; looking them up never touches a network.

What `mops_fl.fetch` brings lands in one cache folder, each with a receipt that says whence it came:
`models/<hub id with / written -->/`, `data/databricks-dolly-15k.jsonl` and `data/super-ni/`.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mops_fl.errors import InputError

RECEIPT = "mops-receipt.json"

DOLLY_ID = "databricks/databricks-dolly-15k"
DOLLY_FILE = "databricks-dolly-15k.jsonl"
DOLLY_REVISION = "bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a"
DOLLY_SHA256 = "2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec"
DOLLY_LICENCE = "CC BY-SA 3.0"

# The official files are in no dataset repository of the hub; this one holds their instances, a file for each task.
SUPER_NI_ID = "Muennighoff/natural-instructions"
SUPER_NI_REVISION = "a29a9757125f4bb1c26445ad0d2ef7d9b2cc9c4c"
SUPER_NI_LICENCE = "Apache-2.0, instances as their sources"


@dataclass(frozen=True)
class DataSource:
    """A file in Dolly's format or a folder of task files, and what to call it.

    Attributes:
        path: The `.jsonl` or `.jsonl.gz` file, or the folder.
        revision: Git revision on the hub, None for data of the user's or the bundled sample.
        is_sample: Whether this is the bundled sample, which is not Dolly.
        description: One phrase for people, fit for a first line, a summary and a report.
    """

    path: Path
    revision: str | None
    is_sample: bool
    description: str


def cache_dir() -> Path:
    """The folder that holds what was fetched: `MOPS_CACHE`, else `~/.cache/mops-fl`."""
    return Path(os.environ.get("MOPS_CACHE") or "~/.cache/mops-fl").expanduser()


def cached_model_path(name: str) -> Path:
    """The folder in the cache that holds (or would hold) the model `name`."""
    return cache_dir() / "models" / name.replace("/", "--")


def cached_dolly_path() -> Path:
    """The file in the cache that holds (or would hold) Dolly."""
    return cache_dir() / "data" / DOLLY_FILE


def cached_super_ni_path() -> Path:
    """The folder in the cache that holds (or would hold) the paper's tasks of Super-Natural Instructions."""
    return cache_dir() / "data" / "super-ni"


def resolve_backbone(name: str) -> Path:
    """Find the model `name`, a local folder or the hub id of a fetched one, without a network.

    Returns:
        A folder with config.json, the tokenizer and safetensors, for transformers' `from_pretrained`.

    Raises:
        InputError: If there is no such model, or its folder is not a model's.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise InputError(f"{local} has no config.json: give a folder that transformers can load, or a hub id.")
        return local
    cached = cached_model_path(name)
    if not cached.is_dir():
        raise InputError(
            f"The backbone {name!r} is neither a local folder nor in the cache {cache_dir()}: "
            f"run `mops-fl fetch --backbone {name}`, or give a folder."
        )
    if not (cached / RECEIPT).is_file() or not (cached / "config.json").is_file():
        raise InputError(f"{cached} is incomplete: delete it and run `mops-fl fetch --backbone {name}`.")
    return cached


def resolve_data(dataset: str, data_path: str) -> DataSource:
    """The source of a dataset: `resolve_dolly` or `resolve_super_ni`."""
    return resolve_dolly(data_path) if dataset == "dolly" else resolve_super_ni(data_path)


def resolve_dolly(data_path: str) -> DataSource:
    """Choose the Dolly file: `data_path`, else `MOPS_DOLLY`, else the cached copy, else the bundled sample.

    Args:
        data_path: A `.jsonl` or `.jsonl.gz` file; empty for none.

    Raises:
        InputError: If a named file does not exist or is no `.jsonl[.gz]`, or the cached copy is corrupt.
    """
    for origin, given in (("data-path", data_path), ("MOPS_DOLLY", os.environ.get("MOPS_DOLLY", ""))):
        if given:
            path = _check_given_file(origin, Path(given).expanduser())
            return DataSource(path, None, is_sample=False, description=f"rows of {path.name} ({origin})")
    cached = cached_dolly_path()
    if cached.is_file():
        check_sha256(cached, DOLLY_SHA256)
        description = f"Dolly-15k ({DOLLY_ID}, revision {DOLLY_REVISION[:8]}, {DOLLY_LICENCE})"
        return DataSource(cached, DOLLY_REVISION, is_sample=False, description=description)
    description = "a small sample in Dolly's format made for this project, not Dolly itself"
    return DataSource(sample_path(), None, is_sample=True, description=description)


def sample_path() -> Path:
    """The bundled sample, `.jsonl` in Dolly's columns."""
    return Path(str(resources.files("mops_fl") / "sample" / "dolly-sample.jsonl"))


def resolve_super_ni(data_path: str) -> DataSource:
    """Choose the folder of task files: `data_path`, else `MOPS_SUPER_NI`, else the cached copy.

    Args:
        data_path: A checkout of allenai/natural-instructions, or a folder of such task files; empty for none.

    Raises:
        InputError: If a named folder does not exist, there is none at all, or the cached copy is incomplete.
    """
    for origin, given in (("data-path", data_path), ("MOPS_SUPER_NI", os.environ.get("MOPS_SUPER_NI", ""))):
        if given:
            folder = Path(given).expanduser()
            if not folder.is_dir():
                raise InputError(f"{origin} names {folder}, which is no folder: give one with task files in it.")
            description = f"task files of {folder.resolve().name} ({origin})"
            return DataSource(folder, None, is_sample=False, description=description)
    cached = cached_super_ni_path()
    if not cached.is_dir():
        raise InputError(
            "There are no task files: give a checkout of allenai/natural-instructions or a folder of its task files "
            "with data-path or MOPS_SUPER_NI, or run `mops-fl fetch --super-ni`."
        )
    require_complete(cached)
    description = f"Super-Natural Instructions ({SUPER_NI_ID}, revision {SUPER_NI_REVISION[:8]})"
    return DataSource(cached, SUPER_NI_REVISION, is_sample=False, description=description)


def require_complete(folder: Path) -> None:
    """Raise `InputError` if the folder of fetched task files lacks the receipt that is written last."""
    if not (folder / RECEIPT).is_file():
        raise InputError(f"{folder} is incomplete: delete it and run `mops-fl fetch --super-ni`.")


def _check_given_file(origin: str, path: Path) -> Path:
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"{origin} names {path}, which is neither .jsonl nor .jsonl.gz: give Dolly in one of these.")
    if not path.is_file():
        raise InputError(f"{origin} names {path}, which does not exist: correct the path or leave it empty.")
    return path


def check_sha256(path: Path, expected: str) -> None:
    """Raise `InputError` unless the file's SHA-256 is `expected` (hexadecimal)."""
    found = file_sha256(path)
    if found != expected:
        raise InputError(
            f"{path} is corrupt or not the expected file (SHA-256 {found} instead of {expected}): "
            "delete it and fetch it again."
        )


def file_sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_receipt(path: Path, receipt: Mapping[str, str]) -> None:
    """Write a receipt: `name`, `source` (hub or pypi), `revision` and/or `sha256`, `licence`."""
    path.write_text(json.dumps(dict(receipt), indent=2) + "\n", encoding="utf-8")


def read_receipt(path: Path) -> dict[str, Any]:
    """Read a receipt; empty if there is none, as for a folder of the user's own."""
    if not path.is_file():
        return {}
    receipt: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return receipt
