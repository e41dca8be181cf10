import json
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w

from clients import resident
from clients.local_training import Training
from experiments import simulation
from experiments.cli import main
from experiments.run_folder import RunFolder
from mops_fl.adapter_folder import load_adapter
from mops_fl.config import METHODS

PROJECT = Path(__file__).parents[2]
# The console script, with more batches of test rows than are done in minutes.
ENDLESS_EVALUATION = """
import sys, time
from clients import trainer
from {} import {} as command

def evaluate_bare(*_, spread):
    answers = spread(time.sleep, [1.0] * 10_000)
    print("queued", flush=True)
    return list(answers)

trainer.evaluate_bare = evaluate_bare
sys.exit(command())
"""

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


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_central_run_goes_on_to_the_same_bits(train, tmp_path, monkeypatch, method):
    values = {"method": method, "evaluate_every": 1, "num_server_rounds": 3}
    train(**values, output_dir=str(tmp_path / "straight"))
    advance = Training.advance

    def interrupted(self, num_steps):
        if self._steps_done == 12:
            raise KeyboardInterrupt
        advance(self, num_steps)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "advance", interrupted)
        code, cut_off = train(**values)
    assert code == 130
    assert RunFolder.open(cut_off).summary["rounds"] == 2
    resident._build_trainer.cache_clear()
    assert main(["train", "--app", "experiments.dolly", "--resume", str(cut_off)]) == 0
    adapters = [load_adapter(path / "adapter").arrays for path in (tmp_path / "straight", cut_off)]
    assert {name: array.tobytes() for name, array in adapters[0].items()} == {
        name: array.tobytes() for name, array in adapters[1].items()
    }


def test_central_run_that_is_to_end_earlier_is_measured_after_its_last_round(train, tmp_path):
    train(num_server_rounds=2, evaluate_every=3, output_dir=str(tmp_path / "straight"))
    _, path = train(num_server_rounds=3, evaluate_every=3)
    (path / "checkpoints/round-000003.safetensors").unlink()  # as if it was cut off in round 3
    config = (path / "config.toml").read_text(encoding="utf-8")
    (path / "config.toml").write_text(config.replace("num-server-rounds = 3", "num-server-rounds = 2"), "utf-8")
    assert main(["train", "--app", "experiments.dolly", "--resume", str(path)]) == 0
    assert RunFolder.open(path).summary["perplexity"] == RunFolder.open(tmp_path / "straight").summary["perplexity"]


def test_central_run_cannot_be_resumed_as_a_federation_nor_the_other_way_round(train, tmp_path, capsys):
    _, path = train()
    assert simulation.run(["--app", "experiments.dolly", "--resume", str(path)]) == 2
    assert "is a central run; go on with it by `mops-fl train --resume`" in capsys.readouterr().err
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    (path / "summary.json").write_text(json.dumps({**summary, "training": "federated"}), encoding="utf-8")
    assert main(["train", "--app", "experiments.dolly", "--resume", str(path)]) == 2
    assert "is a federated run" in capsys.readouterr().err


def test_training_that_is_not_finite_ends_the_run_with_its_start_kept(train, capsys):
    code, path = train(lr=1e30)
    assert code == 1
    assert "the training is not finite any more; lower `lr`, which is 1e+30" in capsys.readouterr().err
    assert RunFolder.open(path).summary["status"] == "failed"


def test_clipping_is_refused(train, capsys):
    assert train(clip_norm=1.0)[0] == 2
    assert "`clip-norm` is 1.0, but central training has no clients; set it to 0" in capsys.readouterr().err


def test_signal_ends_the_command_in_seconds_though_minutes_of_work_are_queued(run_config, tmp_path):
    (tmp_path / "values.toml").write_text(tomli_w.dumps(run_config({"output-dir": str(tmp_path / "run")})), "utf-8")
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    words = ["train", "--app", "experiments.dolly", "-c", str(tmp_path / "values.toml")]
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS_EVALUATION.format(*project["scripts"]["mops-fl"].split(":")), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert "queued\n" in process.stdout
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, errors) == (130, "mops-fl train: interrupted; go on with --resume\n")
    assert RunFolder.open(tmp_path / "run").results()["status"] == "unfinished"
