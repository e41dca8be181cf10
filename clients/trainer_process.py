"""The trainer of a SuperNode in deployment: one process that outlives the process Flower starts for each message.

It is started by the first message and listens on a Unix socket in a folder that only its user can open. A lock makes
sure that two messages never start two of it; one that died is started anew; it ends by itself when its SuperNode is
gone, or when nothing was asked of it for an hour.
"""

import fcntl
import functools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import psutil

from mops_fl.errors import InputError

IDLE_SECONDS = 3600.0
_START_SECONDS = 60.0
_DYING_SECONDS = 2.0  # a process that is being killed takes connections until its memory is gone
_SOCKET = "socket"
_LONGEST_SOCKET_PATH = 107  # bytes, of Linux


class TrainerProcess:
    """The methods of `Trainer`, each carried out by the trainer process; its errors arrive as they were raised."""

    def __init__(self, settings: str) -> None:
        """Nothing is started yet.

        Args:
            settings: the arguments of `Trainer`, as JSON; a trainer with other settings makes room for this one.
        """
        self._settings = settings
        # The SuperNode's launcher of message processes: it ends with the SuperNode, this process with the message.
        self._owner = psutil.Process(os.getppid())

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return functools.partial(self._call, method)

    def _call(self, method: str, *args: object) -> Any:  # noqa: ANN401
        try:
            succeeded, answer = self._ask(method, args)
        except (EOFError, ConnectionError):  # it died, or ended just now; an answer depends on the request alone
            time.sleep(_DYING_SECONDS)
            try:
                succeeded, answer = self._ask(method, args)
            except (EOFError, ConnectionError) as error:
                raise RuntimeError(
                    "The trainer process died twice over this message; the SuperNode's log may say why."
                ) from error
        if succeeded:
            return answer
        raise answer

    def _ask(self, method: str, args: tuple[object, ...]) -> tuple[bool, Any]:
        with _connect(runtime_folder(self._owner), self._owner) as connection:
            connection.send((self._settings, method, args))
            reply: tuple[bool, Any] = connection.recv()
            return reply


def runtime_folder(owner: psutil.Process) -> Path:
    """The folder of the trainer that works for this process, made if need be.

    Raises:
        InputError: somebody else has taken its name, or it is too long for a socket.
    """
    # The hash is of its number and of when it started, counted from the machine's start: no set clock changes it.
    name = f"mops-fl-{os.getuid()}-{owner.pid}-{hash(owner) % 2**32:08x}"
    folder = Path(tempfile.gettempdir()) / name
    if len(str(folder / _SOCKET)) > _LONGEST_SOCKET_PATH:
        raise InputError(f"{folder} is too long a path for a socket; set TMPDIR to a shorter one.")
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or folder.is_symlink():
        raise InputError(f"{folder} is not this user's alone; remove it, or set TMPDIR to a private folder.")
    return folder


def _connect(folder: Path, owner: psutil.Process) -> Connection:
    """A connection to the trainer, which is started if there is none."""
    with _locked(folder):
        try:
            return Client(str(folder / _SOCKET))
        except (FileNotFoundError, ConnectionRefusedError):
            (folder / _SOCKET).unlink(missing_ok=True)
        command = [sys.executable, "-P", "-m", "clients.trainer_process", folder, owner.pid]
        process = subprocess.Popen([str(part) for part in command], stdin=subprocess.DEVNULL)
        deadline, ended = time.monotonic() + _START_SECONDS, False
        while not ended and time.monotonic() < deadline:
            # Looked at first: it ends at once where a message process that was killed had just started another one.
            ended = process.poll() is not None
            try:
                return Client(str(folder / _SOCKET))
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.05)
        process.kill()
    raise RuntimeError("The trainer process did not start; the SuperNode's log says why.")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class _Server:
    """Answers requests, each connection on a thread of its own, as long as its owner lives and somebody asks."""

    def __init__(self, folder: Path, owner: psutil.Process, idle_seconds: float) -> None:
        self._folder = folder
        self._owner = owner
        self._idle_seconds = idle_seconds
        self._listener = Listener(str(folder / _SOCKET))
        self._lock = threading.Lock()
        self._trainer: Any = None
        self._wanted: object = None  # its arguments
        self._state: object = None  # of the file or folder with its rows
        self._active = 0
        self._last_used = time.monotonic()

    def serve(self) -> None:
        """Answer until it is time to end."""
        threading.Thread(target=self._accept, daemon=True).start()
        while (wanted := _lives(self._owner)) and not self._is_idle():
            time.sleep(0.5)
        if wanted:
            with _locked(self._folder):  # whoever connects next finds no socket, and starts another trainer
                self._listener.close()
        else:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _is_idle(self) -> bool:
        with self._lock:
            return not self._active and time.monotonic() - self._last_used > self._idle_seconds

    def _accept(self) -> None:
        while True:
            connection = self._listener.accept()
            with self._lock:
                self._active += 1
            threading.Thread(target=self._answer, args=[connection], daemon=True).start()

    def _answer(self, connection: Connection) -> None:
        try:
            with connection, suppress(EOFError, OSError):  # whoever asked may be gone
                connection.send(self._carry_out(*connection.recv()))
        finally:
            with self._lock:
                self._active -= 1
                self._last_used = time.monotonic()

    def _carry_out(self, settings: str, method: str, args: tuple[object, ...]) -> tuple[bool, object]:
        try:
            return True, getattr(self._trainer_for(settings, method), method)(*args)
        except Exception as error:  # whatever it raises is raised again where it was asked for
            if not isinstance(error, InputError):
                traceback.print_exc()
            return False, _portable(error)

    def _trainer_for(self, settings: str, method: str) -> Any:  # noqa: ANN401
        from clients.config import ClientConfig
        from clients.trainer import Trainer  # here, so that whoever only asks does not import torch

        run_config, own_data = json.loads(settings)
        wanted = ({key: run_config[key] for key in ClientConfig.keys() & set(run_config)}, own_data)
        with self._lock:
            # Each run begins with `describe`: only there are rows looked for that their owner has changed since.
            state = _state(own_data) if own_data and (method == "describe" or not self._state) else self._state
            if (self._wanted, self._state) != (wanted, state):  # the next run's output-dir makes no difference
                self._trainer = None  # the old model goes before the new one comes
                self._trainer = Trainer(*wanted)
                self._wanted, self._state = wanted, state
            return self._trainer


def _state(path: str) -> list[tuple[str, int, int]]:
    """Name, bytes and time of the last change of each file in a folder, or of the one that it is."""
    top = Path(path).expanduser()
    files = [file for file in (top, *sorted(top.rglob("*"))) if file.is_file()]
    return [(str(file), status.st_size, status.st_mtime_ns) for file in files if (status := file.stat())]


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception class may do anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def main(folder: str, owner_pid: str) -> None:
    """Serve in this process, until its owner is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the SuperNode, and that ends this process
    _Server(Path(folder), psutil.Process(int(owner_pid)), IDLE_SECONDS).serve()
    os._exit(0)  # a cohort may still be training for a SuperNode that is gone


if __name__ == "__main__":
    main(*sys.argv[1:])
