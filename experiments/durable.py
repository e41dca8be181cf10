"""Files that are whole or not there, whenever the process is killed or the machine loses its power."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mops_fl.errors import RunError

PARTIAL = ".partial"


def write_durably(path: Path, content: bytes) -> None:
    """Write a file in one step: whoever reads it, now or after a crash, sees the old content or the new.

    Raises:
        RunError: it cannot be written.
    """
    with writing(path):
        # Of this thread alone: on Ray the run and the signal that ends it are in two, and both write the summary.
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}{PARTIAL}")
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)


@contextmanager
def writing(
    path: Path, advice: str = "mend that, then go on with --resume", error_type: type[Exception] = RunError
) -> Iterator[None]:
    """Whatever keeps `path` from being written, a full disk or missing rights, ends the command with one sentence.

    Args:
        path: the file or folder that the sentence names.
        advice: what to do.
        error_type: `RunError`, or `InputError` where the path was given for this alone.

    Raises:
        RunError or InputError: says what.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise error_type(f"{path} cannot be written ({reason}); {advice}.") from error


def _sync_folder(folder: Path) -> None:
    """Make a file's new name last; its content alone is not enough."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
