"""`flower-simulation`, inline: what it prints, what it returns, what it leaves."""

import json
import os
import signal

import pytest

from clients import trainer
from experiments.cli import main
from experiments.run_folder import RunFolder
from strategies.fedprompt import FedPrompt

pytestmark = pytest.mark.usefixtures("command_in_process")


@pytest.fixture
def command(simulate):
    """``command("--flag", ..., key=value)``: exit code and errors of `simulate`."""

    def call(*arguments, **options):
        code, _, errors = simulate(*arguments, **options)
        return code, errors

    return call


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def assert_refused(outcome, complaint):
    """Exit code 2 and one line that says what is wrong: no traceback, nothing else."""
    code, errors = outcome
    assert code == 2
    assert errors.startswith("flower-simulation: ")
    assert complaint in errors
    assert errors.count("\n") == 1, errors
    assert errors.endswith("\n")
    assert "Traceback" not in errors


def test_good_run_returns_0_and_complains_of_nothing(command, tmp_path):
    assert command() == (0, "")
    assert summary_of(tmp_path / "run")["status"] == "complete"


def test_num_supernodes_is_the_number_of_clients(command, tmp_path):
    assert command("--num-supernodes", "4") == (0, "")
    assert summary_of(tmp_path / "run")["num_clients"] == 4


def test_later_run_config_wins_over_a_file(command, tmp_path):
    assert command("-c", "method='fedprompt' seed=3", "-c", "seed=4 num-server-rounds=1") == (0, "")
    summary = summary_of(tmp_path / "run")
    assert (summary["method"], summary["seed"], summary["rounds"]) == ("fedprompt", 4, 1)
    assert RunFolder.open(tmp_path / "run").config["method"] == "fedprompt"


def test_relative_paths_are_made_absolute_before_anything_runs_elsewhere(
    command, tmp_path, monkeypatch, tiny_model_folder
):
    monkeypatch.chdir(tiny_model_folder.parent)
    assert command(output_dir="here/run", backbone=tiny_model_folder.name, num_server_rounds=1) == (0, "")
    config = RunFolder.open(tiny_model_folder.parent / "here/run").config
    assert config["backbone"] == str(tiny_model_folder)
    assert config["output-dir"] == str(tiny_model_folder.parent / "here/run")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"learning_rate": 0.1}, "learning-rate"),
        ({"method": "adalora"}, "`method` is 'adalora'; choose one of: mops, fedprompt, lora, ia3."),
        ({"clients_per_round": 60, "num_clients": 60}, "`clients-per-round` is 60, but only"),
        ({"backbone": "someone/no-such-model"}, "The backbone 'someone/no-such-model' is neither"),
        ({"compression": "sparsegpt:2:4"}, "--recipe sparsegpt:2:4`."),
        ({"data_path": "missing.jsonl"}, "data-path names missing.jsonl, which does not exist"),
        ({"inject_layer": 4}, "`inject-layer` is 4, but the backbone has layers 0 to 3"),
        ({"num_rows": 20}, "too few to train and test on"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_returns_2_with_one_clear_line_and_leaves_no_folder(command, tmp_path, changes, complaint):
    assert_refused(command(**changes), complaint)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("app", ["experiments.alpaca", "experiments.dolly.alpaca", "no/such/folder"])
def test_unknown_app_returns_2(command, app):
    assert_refused(command(app=app), f"There is no app '{app}'")


def test_occupied_output_folder_returns_2_and_is_left_alone(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/diary.txt").write_text("dear diary")
    assert_refused(command(), "is not empty; name another folder")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["diary.txt"]


def test_folder_of_a_finished_run_returns_2_and_is_left_alone(command, tmp_path):
    assert command(num_server_rounds=1)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert_refused(command(), "is not empty; name another folder")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_the_key_resume_is_answered_with_the_option_of_that_name(command, tmp_path):
    assert command(num_server_rounds=1)[0] == 0
    for folder in ("run", "new"):
        assert_refused(command(resume=True, output_dir=str(tmp_path / folder)), "go on with `--resume RUN` in place of")


def test_clients_with_rows_of_their_own_are_not_simulated(command):
    assert_refused(command(partitioner="own-rows"), "clients that are simulated have no rows of their own")


def test_resume_of_no_run_returns_2(command, tmp_path):
    assert_refused(command("--resume", str(tmp_path / "nothing")), "is not a run folder")


def test_resume_takes_no_run_config(command, tmp_path):
    assert command(num_server_rounds=1)[0] == 0
    assert_refused(
        command("--resume", str(tmp_path / "run"), "--run-config", "seed=1"),
        "--resume goes on with the run's own configuration",
    )


def test_run_on_a_pruned_and_quantised_backbone(command, tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MOPS_CACHE", str(tmp_path / "cache"))
    small = ["--run-config", "num-rows=210 server-rows=35 max-length=64", "--calibration-rows", "5"]
    assert main(["compress", "--backbone", str(tiny_model_folder), "--recipe", "wanda:2:4", *small]) == 0
    code, errors = command(compression="wanda:2:4", quantization="int8")
    assert code == 0, errors
    summary = summary_of(tmp_path / "run")
    assert (summary["status"], summary["compression"], summary["quantization"]) == ("complete", "wanda:2:4", "int8")


def test_round_in_which_every_client_fails_returns_1_and_marks_the_run_failed(command, tmp_path, monkeypatch):
    def burn(*_):
        raise OSError("disk on fire")

    monkeypatch.setattr(trainer, "train_cohort", burn)
    code, errors = command()
    assert code == 1
    assert errors.startswith("flower-simulation: Round 1 had no usable reply from 3 clients.")
    assert errors.count("OSError: disk on fire") == 1
    summary = summary_of(tmp_path / "run")
    assert (summary["status"], summary["rounds"]) == ("failed", 0)
    assert summary["perplexity"]["all"] > 1


def test_unforeseen_error_returns_1_with_its_traceback_and_marks_the_run_failed(command, tmp_path, monkeypatch):
    def break_down(*_):
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr(FedPrompt, "aggregate_train", break_down)
    code, errors = command()
    assert code == 1
    assert "Traceback" in errors
    assert "ZeroDivisionError: unforeseen" in errors
    assert summary_of(tmp_path / "run")["status"] == "failed"


def interrupt_in_round_2(monkeypatch, number):
    """A real signal to this very process while round 2 is aggregated."""
    aggregate = FedPrompt.aggregate_train

    def interrupted(self, server_round, replies):
        if server_round == 2:
            os.kill(os.getpid(), number)
        return aggregate(self, server_round, replies)

    monkeypatch.setattr(FedPrompt, "aggregate_train", interrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_ends_the_run_with_its_code_and_a_valid_folder(command, tmp_path, monkeypatch, number, code):
    interrupt_in_round_2(monkeypatch, number)
    assert command() == (code, "flower-simulation: interrupted; go on with --resume\n")
    run = RunFolder.open(tmp_path / "run")
    assert (run.summary["status"], run.summary["rounds"], run.summary["client_steps"]) == ("interrupted", 1, 6)
    assert max(entry["round"] for entry in run.metrics()) == 1


def test_signal_to_a_command_that_still_loads_the_model_does_not_mark_another_ones_run(command, tmp_path, monkeypatch):
    assert command(num_server_rounds=1)[0] == 0
    run = RunFolder.open(tmp_path / "run")
    run.write_summary({**run.summary, "status": "running"})
    monkeypatch.setattr(trainer.Trainer, "setting", lambda self: signal.raise_signal(signal.SIGINT))
    with run.claim():
        assert command("--resume", str(tmp_path / "run"))[0] == 130
    assert run.summary["status"] == "running"


def test_folder_that_only_looks_like_a_run_returns_2(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/summary.json").write_text("{}")
    assert_refused(command(), "is not empty; name another folder")


def test_run_still_going_in_the_output_folder_is_not_marked(command, tmp_path):
    assert command(num_server_rounds=1)[0] == 0
    running = json.dumps({**summary_of(tmp_path / "run"), "status": "running"})
    (tmp_path / "run/summary.json").write_text(running)
    assert_refused(command(), "is not empty; name another folder")
    assert (tmp_path / "run/summary.json").read_text() == running


def test_tilde_in_the_folder_to_go_on_with_is_the_home_folder(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command(num_server_rounds=1)[0] == 0
    assert command("--resume=~/run") == (0, "")
    assert RunFolder.open(tmp_path / "run").config["output-dir"] == str(tmp_path / "run")


def test_resume_takes_no_number_of_clients(command, tmp_path):
    assert command(num_server_rounds=1)[0] == 0
    outcome = command("--resume", str(tmp_path / "run"), "--num-supernodes", "7")
    assert_refused(outcome, "leave all other options away")


def test_run_that_another_process_writes_is_not_touched(command, tmp_path):
    assert command(num_server_rounds=1)[0] == 0
    run = RunFolder.open(tmp_path / "run")
    run.write_summary({**run.summary, "status": "running"})
    before = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    with run.claim():
        outcome = command("--resume", str(tmp_path / "run"))
        assert_refused(outcome, "is being written by another process")
        assert {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()} == before
    assert command("--resume", str(tmp_path / "run"))[0] == 0
