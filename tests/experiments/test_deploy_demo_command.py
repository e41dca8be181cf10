import json
import signal
from collections import Counter

import pytest

from clients.trainer import Trainer
from experiments import deploy_demo_command
from experiments.cli import main
from experiments.deploy_demo_command import SERVER_ROWS_PER_TASK, cut_data
from mops_fl.data import DOLLY_TASKS, read_dolly
from mops_fl.errors import InputError
from mops_fl.sources import resolve_dolly

pytestmark = pytest.mark.usefixtures("command_in_process")


def texts(path):
    return [(row.instruction, row.context, row.response, row.task) for row in read_dolly(path)]


def write_rows(path, count):
    rows = [(f"{number}?", DOLLY_TASKS[number % len(DOLLY_TASKS)]) for number in range(count)]
    lines = [{"instruction": text, "context": "", "response": "yes", "category": task} for text, task in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


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


@pytest.mark.parametrize("beside_the_servers", [-100, 0, 2])
def test_file_without_a_row_for_every_node_is_refused(tmp_path, beside_the_servers):
    few = tmp_path / "few.jsonl"
    write_rows(few, SERVER_ROWS_PER_TASK * len(DOLLY_TASKS) + beside_the_servers)
    with pytest.raises(InputError, match=r"few\.jsonl has \d+ rows .* too few for 3 nodes"):
        cut_data(few, tmp_path, num_nodes=3, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["few.jsonl"]
    write_rows(few, SERVER_ROWS_PER_TASK * len(DOLLY_TASKS) + 1)
    assert len(texts(cut_data(few, tmp_path, num_nodes=1, seed=0)[1])) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--nodes", "0"], "num-clients is 0"),
        (["--app", "experiments.super_ni"], "is on super-ni"),
        (["-c", "no-such-key=1"], "Unknown run-config key"),
        (["-c", "num-clients=4"], "sets `num-clients` (give --nodes); take that out of --run-config"),
        (["-c", "lr=0.1 num-server-rounds=20"], "sets `num-server-rounds` (give --rounds)"),  # the app's own value
        (["-c", "data-path='rows.jsonl'"], "sets `data-path` (give --data)"),
        (
            ["-c", "server-rows=7 evaluate-on='server'", "-c", "partitioner='iid'"],
            "sets `server-rows`, `partitioner`, `evaluate-on`; take",
        ),
        (["-c", "resume=true"], "cannot go on with a run; take `resume` out"),
        (["-c", "clients-per-round=4"], "`clients-per-round` is 4, but `num-clients` is 3"),
        (["-c", "backbone='someone/no-such-model'"], "neither a local folder nor in the cache"),
        (["-c", "backbone='someone/no-such-model' compression='wanda:75%'"], "neither a local folder nor in the cache"),
        (["-c", "compression='wanda:75%@1a2b'"], "pruned by wanda:75%@1a2b is not in the cache"),
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


@pytest.fixture
def no_deployment(tmp_path, monkeypatch):
    """Nothing is started: only what comes before and after is the command's own."""

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


def test_run_that_never_begins_shows_the_logs(no_deployment, tiny_model_folder, capsys):
    assert main(["deploy-demo", "-c", f"backbone='{tiny_model_folder}'"]) == 1
    errors = capsys.readouterr().err
    assert "The run did not even begin; the logs end with\nthe SuperNode's last words" in errors


def test_missing_model_is_pruned_on_the_servers_rows_and_named_by_its_key(
    no_deployment, tiny_model_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("MOPS_CACHE", str(tmp_path / "cache"))
    ran = []

    def take(_deployment, _app, run_config):
        ran.append((run_config["compression"], Trainer(run_config).setting().rows["server"]))

    monkeypatch.setattr(deploy_demo_command, "_run", take)
    small = f"backbone='{tiny_model_folder}' inject-layer=2 max-length=64 dtype='float32' compression='wanda:75%'"
    for seed in (0, 0, 1):
        assert main(["deploy-demo", "-c", small, "-c", f"seed={seed}"]) == 1  # nothing begins here
    (first, rows), again, (other, _) = ran
    assert again == (first, rows)
    assert {first, other} == {f"wanda:75%@{path.name[-12:]}" for path in (tmp_path / "cache" / "compressed").iterdir()}
    assert first != other
    assert rows == SERVER_ROWS_PER_TASK * len(DOLLY_TASKS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_exit_code_tells_the_signal(no_deployment, tiny_model_folder, capsys, monkeypatch, number):
    monkeypatch.setattr(deploy_demo_command, "_run", lambda *_: signal.raise_signal(number))
    assert main(["deploy-demo", "-c", f"backbone='{tiny_model_folder}'"]) == 128 + number
    assert "deploy-demo: interrupted; the logs end with" in capsys.readouterr().err
