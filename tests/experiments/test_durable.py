"""Files that are whole or not there."""

import os
import threading

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
