"""Whole runs on a full disk, without a reader, or ended from outside: one sentence, code not 0, nothing lost."""

import errno
import os
import subprocess

import pytest

from experiments import durable
from experiments.app_folder import AppFolder
from experiments.display import Display
from experiments.run_folder import RunFolder
from experiments.runtimes import run_inline
from mops_fl.adapter_folder import load_adapter
from mops_fl.errors import RunError
from strategies.fedprompt import FedPrompt

pytestmark = pytest.mark.usefixtures("command_in_process")


def one_sentence(errors):
    assert errors.startswith("flower-simulation: ")
    assert errors.count("\n") == 1, errors
    assert "Traceback" not in errors
    return errors


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("writes", [1, 4, 6, 9])
def test_full_disk_ends_the_run_with_one_sentence_and_it_can_be_resumed(simulate, monkeypatch, tmp_path, writes):
    assert simulate(output_dir=str(tmp_path / "straight"))[0] == 0
    fsync, left = os.fsync, [writes]

    def full(descriptor):
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fsync", full)
        code, _, errors = simulate()
    assert code == (2 if writes == 1 else 1)
    assert "cannot be written (No space left on device)" in one_sentence(errors)
    if (tmp_path / "run/config.toml").exists():
        assert simulate("--resume", str(tmp_path / "run"))[0] == 0
    else:
        assert simulate()[0] == 0
    resumed, straight = (load_adapter(tmp_path / name / "adapter").arrays for name in ("run", "straight"))
    assert all((resumed[name] == straight[name]).all() for name in straight)


def test_disk_that_is_really_full_and_then_read_only(simulate, small_disk):
    code, _, errors = simulate(output_dir=str(small_disk / "run"), num_server_rounds=20)
    assert code == 1
    assert "cannot be written (No space left on device)" in one_sentence(errors)
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    assert simulate("--resume", str(small_disk / "run"))[0] == 0

    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for code, _, errors in (
        simulate("--resume", str(small_disk / "run")),
        simulate(output_dir=str(small_disk / "another")),
    ):
        assert code in (1, 2)
        assert "cannot be written (Read-only file system)" in one_sentence(errors)


def test_pipe_that_nobody_reads_any_more_ends_the_run_with_one_sentence(simulate, monkeypatch, tmp_path):
    def closed(*_):
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904  # as rich's Console does

    monkeypatch.setattr(Display, "round", closed)
    code, _, errors = simulate()
    assert code == 1
    assert "Nobody reads any more what the run prints; go on with --resume." in one_sentence(errors)
    assert RunFolder.open(tmp_path / "run").summary["status"] == "interrupted"


def test_end_that_flower_asks_for_is_handed_on(simulate, monkeypatch, tmp_path):
    def stopped(*_):
        raise SystemExit(0)  # as Flower's handler of SIGTERM does in a ServerApp

    monkeypatch.setattr(Display, "round", stopped)
    with pytest.raises(SystemExit, match="0"):
        simulate()
    assert RunFolder.open(tmp_path / "run").summary["status"] == "interrupted"


def test_output_folder_that_cannot_be_made_is_refused(simulate, tmp_path):
    (tmp_path / "file").write_text("no folder")
    code, _, errors = simulate(output_dir=str(tmp_path / "file/run"))
    assert code == 2
    assert "cannot be written (Not a directory); choose another output-dir" in one_sentence(errors)


def test_run_that_flower_itself_starts_says_that_it_failed(run_config, tmp_path, monkeypatch):
    def fail(*_):
        raise RunError("too few")

    monkeypatch.setattr(FedPrompt, "aggregate_train", fail)
    values = run_config({"output-dir": str(tmp_path / "run")})
    with pytest.raises(RunError):
        run_inline(AppFolder.find("experiments.dolly"), values, catch_signals=lambda: None)
    assert RunFolder.open(tmp_path / "run").summary["status"] == "failed"
