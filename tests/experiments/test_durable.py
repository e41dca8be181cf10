"""Files that are whole or not there."""

import os
import stat
import threading
from pathlib import Path

from experiments import durable
from experiments.durable import write_durably


def test_two_threads_may_write_one_file(tmp_path, monkeypatch):
    path, fsync = tmp_path / "summary.json", os.fsync

    def meanwhile(descriptor):
        patch.undo()
        second = threading.Thread(target=write_durably, args=(path, b"second"))
        second.start()
        second.join()
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fsync", meanwhile)
        write_durably(path, b"first")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_the_disk_before_it_has_its_name_and_the_name_before_anything_goes_on(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "content")
        fsync(descriptor)

    def replaced(path, target):
        done.append("name")
        return replace(path, target)

    monkeypatch.setattr(durable.os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write_durably(tmp_path / "file", b"content")
    assert done == ["content", "name", "folder"]
