from collections import Counter

import pytest

from experiments import deploy_demo_command
from experiments.cli import main
from experiments.deploy_demo_command import SERVER_ROWS_PER_TASK, cut_data
from mops_fl.data import DOLLY_TASKS, read_dolly
from mops_fl.sources import resolve_dolly

pytestmark = pytest.mark.usefixtures("command_in_process")


def texts(path):
    return [(row.instruction, row.context, row.response, row.task) for row in read_dolly(path)]


def test_every_row_goes_to_the_server_or_to_one_node(tmp_path):
    parts = [texts(path) for path in cut_data(None, tmp_path, num_nodes=3, seed=0)]
    whole = texts(resolve_dolly("").path)
    assert Counter(row for part in parts for row in part) == Counter(whole)
    assert Counter(row[3] for row in parts[0]) == dict.fromkeys(DOLLY_TASKS, SERVER_ROWS_PER_TASK)
    mixtures = [Counter(row[3] for row in part) for part in parts[1:]]
    assert all(mixture != mixtures[0] for mixture in mixtures[1:])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "dolly-sample-server.jsonl", "dolly-sample-site-0.jsonl", "dolly-sample-site-1.jsonl",
        "dolly-sample-site-2.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--nodes", "0"], "num-clients is 0"),
        (["--app", "experiments.super_ni"], "is on super-ni"),
        (["-c", "no-such-key=1"], "Unknown run-config key"),
        (["-c", "backbone='someone/no-such-model'"], "neither a local folder nor in the cache"),
        (["--data", "missing.jsonl"], "which does not exist"),
    ],
)
def test_bad_input_starts_nothing(tiny_model_folder, capsys, tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    assert main(["deploy-demo", "-c", f"backbone='{tiny_model_folder}'", *arguments]) == 2
    errors = capsys.readouterr()
    assert complaint in errors.err
    assert "starting" not in errors.out
    assert not list(tmp_path.iterdir())


def test_run_that_never_begins_shows_the_logs(tiny_model_folder, capsys, tmp_path, monkeypatch):
    class Deployment:
        def __init__(self, folder, insecure):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def tails(self):
            return "the SuperNode's last words"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(deploy_demo_command, "LocalDeployment", Deployment)
    monkeypatch.setattr(deploy_demo_command, "_start", lambda *_: None)
    monkeypatch.setattr(deploy_demo_command, "_run", lambda *_: None)
    assert main(["deploy-demo", "-c", f"backbone='{tiny_model_folder}'"]) == 1
    errors = capsys.readouterr().err
    assert "The run did not even begin; the logs end with\nthe SuperNode's last words" in errors
