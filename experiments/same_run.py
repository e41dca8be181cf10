"""A run that is gone on with must be the one that was begun, or its result would be that of neither."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clients.setting import Setting
from experiments.run_folder import RunFolder
from mops_fl.config import Scalar
from mops_fl.errors import InputError

# What a run that is gone on with may have otherwise than when it began: none of it changes what a round comes to.
_MAY_CHANGE = {"output-dir", "resume", "data-path", "num-server-rounds", "evaluate-every", "round-timeout"}
_MAY_CHANGE |= {"cache-megabytes", "cache-file-megabytes", "min-replies"}
_MAY_CHANGE |= {"dtype"}  # "auto" may come to another elsewhere, so what it comes to is compared
_PROGRAMS = {"federated": "flower-simulation", "central": "mops-fl train"}


def require_training(folder: RunFolder, training: str) -> None:
    """Refuse to go on with a run of the other kind.

    Raises:
        InputError: it is one.
    """
    found = (folder.summary or {}).get("training", training)
    if found != training:
        raise InputError(f"{folder.path} is a {found} run; go on with it by `{_PROGRAMS[found]} --resume`.")


def require_same_run(folder: RunFolder, run_config: Mapping[str, Scalar], setting: Setting) -> None:
    """Refuse other values, weights or rows, and another number format, than the run was begun with.

    Raises:
        InputError: says which.
    """
    for key, value in folder.config.items():
        if key not in _MAY_CHANGE and run_config.get(key, value) != value:
            raise InputError(
                f"{folder.path} was begun with {key} = {value!r}, not {run_config[key]!r}; resume it with its own "
                "values, or give another output-dir."
            )
    summary = folder.summary or {}
    if summary.get("dtype", setting.dtype) != setting.dtype:
        raise InputError(
            f"{folder.path} was begun in {summary['dtype']}, but `dtype` = {run_config['dtype']!r} comes to "
            f"{setting.dtype} here; set it to {summary['dtype']!r} (for --resume in the run's config.toml)."
        )
    if summary.get("data_sha256", setting.data_sha256) != setting.data_sha256:
        raise InputError(
            f"{folder.path} was begun on other rows ({summary['data_description']}) than there are now "
            f"({setting.data_description}); bring those back."
        )
    if summary.get("backbone_sha256", setting.backbone_sha256) != setting.backbone_sha256:
        raise InputError(f"{folder.path} was begun with other weights of {summary['backbone']}; bring those back.")
    if folder.partition and _rows_of_clients(folder.partition) != _rows_of_clients(setting.manifest):
        raise InputError(
            f"{folder.path} was begun with other rows at its clients than they have now; bring those back."
        )


def require_no_more_rounds(path: Path, rounds_done: int, num_server_rounds: int) -> None:
    """Refuse a number of rounds that the run is beyond already.

    Raises:
        InputError: it is.
    """
    if rounds_done > num_server_rounds:
        raise InputError(
            f"{path} has {rounds_done} rounds done, more than `num-server-rounds`, which is {num_server_rounds}; "
            f"give {rounds_done} or more."
        )


def _rows_of_clients(partition: Mapping[str, Any]) -> list[list[tuple[str, int]]]:
    """How many rows of each task the clients have, in an order that does not depend on how they are numbered."""
    return sorted(sorted(client["per-task"].items()) for client in partition["clients"])
