import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from clients import trainer_process as module
from clients.trainer_process import TrainerProcess, _Server, _state, runtime_folder
from mops_fl.errors import InputError
from mops_fl.sources import sample_path


@pytest.fixture
def owner(monkeypatch):
    """A process that stands for the SuperNode; folders lie in a place of the test's own, with a short path."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        monkeypatch.setattr(os, "getppid", lambda: process.pid)
        yield process
        process.communicate()
        deadline = time.monotonic() + 15
        while trainers_of(process):
            assert time.monotonic() < deadline, "a trainer outlives its SuperNode"
            time.sleep(0.1)
        assert not list(Path(folder).iterdir())


def trainers_of(owner):
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "clients.trainer_process" in command and command[-1] == str(owner.pid) and process.status() != "zombie":
            found.append(process)
    return found


@pytest.fixture
def settings(run_config):
    return json.dumps([run_config(), ""])


def test_messages_at_once_share_one_process_and_later_ones_too(owner, settings, run_config):
    names = []
    threads = [
        threading.Thread(target=lambda: names.append(TrainerProcess(settings).describe(3).trainer)) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    next_run = json.dumps([run_config({"output-dir": "elsewhere", "num-server-rounds": 7}), ""])
    names.append(TrainerProcess(next_run).describe(3).trainer)  # another run with the same model
    assert len(names) == 7
    assert len(set(names)) == 1
    assert len(trainers_of(owner)) == 1

    (first,) = trainers_of(owner)
    first.kill()
    again = TrainerProcess(settings).describe(3)
    assert again.trainer not in names
    assert [process.pid for process in trainers_of(owner)] != [first.pid]

    other = TrainerProcess(json.dumps([run_config({"lr": 0.5}), ""])).describe(3)
    assert other.trainer != again.trainer  # another trainer, in the same process
    assert len(trainers_of(owner)) == 1

    with pytest.raises(InputError, match="There is no client 99"):
        TrainerProcess(settings).describe(99)
    with pytest.raises(AttributeError, match="no_such_method"):
        TrainerProcess(settings).no_such_method()


def test_message_over_which_the_trainer_dies_is_asked_once_more(owner, settings, monkeypatch):
    answers = [EOFError(), (True, "the answer"), ConnectionResetError(), EOFError()]

    def ask(self, method, arguments):
        answer = answers.pop(0)
        if isinstance(answer, Exception):  # what a connection to a process that dies ends with
            raise answer
        return answer

    monkeypatch.setattr(TrainerProcess, "_ask", ask)
    assert TrainerProcess(settings).describe(0) == "the answer"
    with pytest.raises(RuntimeError, match="died twice"):
        TrainerProcess(settings).describe(0)


def test_folder_is_its_users_alone(owner):
    folder = runtime_folder(psutil.Process(owner.pid))
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    with pytest.raises(InputError, match="not this user's alone"):
        runtime_folder(psutil.Process(owner.pid))
    folder.rmdir()
    folder.symlink_to(tempfile.mkdtemp(dir="/tmp"))
    target = folder.readlink()
    with pytest.raises(InputError, match="not this user's alone"):
        runtime_folder(psutil.Process(owner.pid))
    folder.unlink()
    target.rmdir()


def test_folder_with_a_long_path_is_refused(owner, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 120)))
    with pytest.raises(InputError, match="set TMPDIR to a shorter one"):
        runtime_folder(psutil.Process(owner.pid))


def test_idle_trainer_ends_and_the_next_message_finds_no_socket(owner):
    process = psutil.Process(owner.pid)
    folder = runtime_folder(process)
    began = time.monotonic()
    _Server(folder, process, idle_seconds=0.2).serve()
    assert time.monotonic() - began < 5
    assert not (folder / "socket").exists()
    with pytest.raises(FileNotFoundError):
        module.Client(str(folder / "socket"))
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_request_that_cannot_be_read_does_not_keep_an_idle_trainer(owner):
    process = psutil.Process(owner.pid)
    folder = runtime_folder(process)
    server = _Server(folder, process, idle_seconds=0.2)
    with module.Client(str(folder / "socket")) as connection:
        connection.send_bytes(b"no pickle")
        serving = threading.Thread(target=server.serve, daemon=True)
        serving.start()
        serving.join(timeout=20)
    assert not serving.is_alive()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_next_run_sees_that_a_client_has_changed_its_rows(owner, run_config, tmp_path):
    lines = sample_path().read_text(encoding="utf-8").splitlines(keepends=True)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(lines[:50]), encoding="utf-8")
    client = TrainerProcess(json.dumps([run_config({"partitioner": "own-rows"}), str(rows)]))
    before = client.describe(0)
    assert client.describe(0) == before
    rows.write_text("".join(lines[:20]), encoding="utf-8")
    after = client.describe(0)
    assert sum(after.own_rows.values()) < sum(before.own_rows.values())
    assert after.trainer != before.trainer


@pytest.mark.parametrize("path", ["~/rows.jsonl", "~"])
def test_rows_below_the_home_folder_are_seen_to_change(monkeypatch, tmp_path, path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("one", encoding="utf-8")
    before = _state(path)
    (tmp_path / "rows.jsonl").write_text("another", encoding="utf-8")
    assert _state(path) != before
