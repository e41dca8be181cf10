import json

import pytest

from experiments import simulation
from experiments.cli import main
from experiments.run_folder import RunFolder
from mops_fl.methods import METHODS

pytestmark = pytest.mark.usefixtures("command_in_process")


@pytest.fixture
def train(run_config, tmp_path):
    """``train(lr=0.1)``: exit code and folder of a tiny `mops-fl train`."""

    def command(**changes):
        values = run_config({name.replace("_", "-"): value for name, value in changes.items()})
        values["output-dir"] = values["output-dir"] or str(tmp_path / "run")
        text = " ".join(f"{name}={json.dumps(value)}" for name, value in values.items())
        return main(["train", "--app", "experiments.dolly", "-c", text]), tmp_path / "run"

    return command


@pytest.mark.parametrize("method", METHODS)
def test_central_run_leaves_a_run_folder_with_as_many_steps_as_the_federation(train, method):
    code, path = train(method=method)
    assert code == 0
    folder = RunFolder.open(path)
    summary = folder.summary
    assert (summary["status"], summary["training"], summary["method"]) == ("complete", "central", method)
    assert summary["client_steps"] == 2 * 3 * 2  # rounds, clients a round, local steps
    assert (summary["bytes_up"], summary["bytes_down"], summary["failures"]) == (0, 0, 0)
    assert summary["perplexity"] != summary["perplexity_before"]
    assert [entry["client-steps"] for entry in folder.metrics() if entry["metric"] == "loss"] == [6, 12]


def test_unknown_key_is_one_sentence_and_code_2(train, capsys):
    assert main(["train", "--app", "experiments.dolly", "-c", "rate=1"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("mops-fl train: ")
    assert errors.count("\n") == 1


def test_central_run_cannot_be_resumed_as_a_federation(train, monkeypatch, capsys):
    _, path = train()
    exits = []
    monkeypatch.setattr(simulation.os, "_exit", exits.append)
    simulation.main(["--app", "experiments.dolly", "--resume", str(path)])
    assert exits == [2]
    assert "is a central run" in capsys.readouterr().err
