"""`mops-fl explore` refuses what it cannot show in a sentence, before anything is loaded."""

import importlib.util
import socket

import pytest

from experiments import explore_models
from experiments.cli import main


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(explore_models, "load_exhibits", lambda *_: pytest.fail("loaded"))


def refusal(capsys, *arguments):
    assert main(["explore", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_missing_gradio_is_named_with_its_remedy(monkeypatch, capsys, make_usable_run):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    assert "pip install 'mops-fl[explore]'" in refusal(capsys, make_usable_run().path)


@pytest.mark.parametrize("port", [-1, 65536])
def test_impossible_port_is_refused(port, capsys, make_usable_run):
    assert f"`port` is {port}" in refusal(capsys, make_usable_run().path, f"--port={port}")


def test_taken_port_is_refused(capsys, make_usable_run):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"Port {port} cannot be used" in refusal(capsys, make_usable_run().path, "--port", port)


def test_folder_that_is_no_run_or_has_no_adapter_is_refused(capsys, make_run, tmp_path):
    assert "is not a run folder" in refusal(capsys, tmp_path)
    assert "holds no readable adapter" in refusal(capsys, make_run().path)


def test_runs_of_different_backbones_are_refused(capsys, make_usable_run):
    runs = [make_usable_run("a"), make_usable_run("b", quantization="int8")]
    assert "explore only runs of one backbone together" in refusal(capsys, *(run.path for run in runs))
