"""Get the paper's seven tasks of Super-Natural Instructions once into the cache, from a Hugging Face hub.

The official task files are on GitHub only. The hub has their instances: `<split>/<task>_<split>.jsonl`, a line for each
reference with `id`, `definition`, `inputs` and `targets`. They are put back together as task files, so that whatever
reads the data knows one format.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub

from mops_fl.errors import InputError
from mops_fl.fetch import HUB_ERRORS, HUB_TIMEOUT_SECONDS, first_line, staged
from mops_fl.sources import (
    RECEIPT,
    SUPER_NI_ID,
    SUPER_NI_LICENCE,
    SUPER_NI_REVISION,
    cached_super_ni_path,
    check_sha256,
    require_complete,
    write_receipt,
)
from mops_fl.task_choice import list_tasks
from mops_fl.task_files import PAPER_TASKS

ELSEWHERE = "clone github.com/allenai/natural-instructions and name it with data-path or MOPS_SUPER_NI"


def fetch_super_ni() -> Path:
    """Make the paper's seven tasks available locally; what is there already is returned at once.

    Returns:
        The folder that `resolve_super_ni("")` names from now on, unless `MOPS_SUPER_NI` names another.

    Raises:
        InputError: If no hub answers, it lacks one of the tasks, or what came is corrupt.
    """
    target = cached_super_ni_path()
    if target.is_dir():
        require_complete(target)
        return target
    try:
        with staged(target) as folder, tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            (folder / "tasks").mkdir()
            for task, (file, sha256) in _files_on_hub().items():
                content = task_from_lines(_download(file, sha256, Path(scratch)))
                (folder / "tasks" / f"{task}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
            receipt = {"name": SUPER_NI_ID, "source": "hub", "revision": SUPER_NI_REVISION, "licence": SUPER_NI_LICENCE}
            write_receipt(folder / RECEIPT, receipt)
    except HUB_ERRORS as error:
        raise InputError(f"{SUPER_NI_ID} could not be had from the hub ({first_line(error)}): {ELSEWHERE}.") from error
    return target


def task_from_lines(path: Path) -> dict[str, Any]:
    """The task of a file of the hub's, in the official schema; lines of one instance become its references.

    Raises:
        InputError: a line is not as the hub's are.
    """
    definition = ""
    outputs: dict[tuple[str, str], list[str]] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                fields = json.loads(line)
                instance = (fields["id"], fields["inputs"])
                definition, target = fields["definition"], fields["targets"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"Line {number} of {path.name} from {SUPER_NI_ID} lacks id, definition, inputs or targets: "
                    f"{ELSEWHERE}."
                ) from error
            outputs.setdefault(instance, []).append(target)
    instances = [{"id": key, "input": text, "output": targets} for (key, text), targets in outputs.items()]
    return {"Source": [SUPER_NI_ID], "Definition": [definition], "Instances": instances}


def _files_on_hub() -> Mapping[str, tuple[str, str | None]]:
    """Path and SHA-256 (None where the hub states none) of each of the seven tasks, by task.

    Raises:
        InputError: a task is not there.
    """
    info = huggingface_hub.dataset_info(
        SUPER_NI_ID, revision=SUPER_NI_REVISION, files_metadata=True, timeout=HUB_TIMEOUT_SECONDS
    )
    found = {_task_of(file.rfilename): file for file in info.siblings or []}
    if missing := [task for task in PAPER_TASKS if task not in found]:
        raise InputError(f"{SUPER_NI_ID} has no file of {list_tasks(missing)}: {ELSEWHERE}.")
    files = [found[task] for task in PAPER_TASKS]
    return {
        task: (file.rfilename, file.lfs.sha256 if file.lfs else None)
        for task, file in zip(PAPER_TASKS, files, strict=True)
    }


def _task_of(file: str) -> str:
    split, _, name = file.partition("/")
    return name.removesuffix(f"_{split}.jsonl")


def _download(file: str, sha256: str | None, folder: Path) -> Path:
    path = huggingface_hub.hf_hub_download(
        SUPER_NI_ID,
        file,
        repo_type="dataset",
        revision=SUPER_NI_REVISION,
        local_dir=folder,
        etag_timeout=HUB_TIMEOUT_SECONDS,
    )
    if sha256 is not None:
        check_sha256(Path(path), sha256)
    return Path(path)
