"""The Super-NI app: its values, and a whole run of it on task files, on the tiny model, in this process."""

import json
import tomllib
from pathlib import Path

import pytest
import tomli_w

from experiments import simulation
from experiments.app_folder import AppFolder
from experiments.config import ExperimentConfig
from experiments.run_folder import RunFolder

APPS = Path(__file__).parents[2] / "experiments"
OVERLAYS = sorted(path.stem for path in (APPS / "super_ni").glob("*.toml") if path.name != "pyproject.toml")
SIZES = {"task010_colours": 60, "task011_animals_of_the_farm": 60, "task012_numbers": 12}


def test_app_has_the_keys_of_the_dolly_app_and_is_valid():
    super_ni, dolly = (AppFolder.find(f"experiments.{name}").run_config(()) for name in ("super_ni", "dolly"))
    assert list(super_ni) == list(dolly)
    data = ExperimentConfig.from_run_config(super_ni).client.data
    assert (data.dataset, data.num_rows, data.test_fraction) == ("super-ni", 5000, 0.1)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_changes_the_app_into_another_valid_experiment(overlay):
    plain = AppFolder.find("experiments.super_ni").run_config(())
    changed = AppFolder.find(f"experiments.super_ni.{overlay}").run_config(())
    ExperimentConfig.from_run_config(changed)
    own = tomllib.loads((APPS / f"super_ni/{overlay}.toml").read_text(encoding="utf-8"))
    assert changed == {**plain, **own} != plain


def test_paper_overlay_holds_the_papers_protocol():
    config = ExperimentConfig.from_run_config(AppFolder.find("experiments.super_ni.paper").run_config(()))
    client, federation = config.client, config.federation
    assert (client.partition.num_clients, federation.clients_per_round, federation.num_server_rounds) == (100, 10, 20)
    assert (client.train.local_steps, client.train.batch_size, client.train.lr) == (250, 1, 1e-3)
    assert (client.adapter.inject_layer, client.adapter.num_experts, client.trainer.eval_rows) == (10, 7, 0)


@pytest.fixture
def folder(tmp_path):
    """Three small tasks in the official schema, the last with few rows."""
    (tmp_path / "data").mkdir()
    for task, size in SIZES.items():
        instances = [{"id": f"{i}", "input": f"{task} {i}", "output": [f"{i}", f"no. {i}"]} for i in range(size)]
        content = {"Definition": [f"Name one of {task}."], "Positive Examples": [], "Instances": instances}
        (tmp_path / "data" / f"{task}.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path / "data"


@pytest.fixture
def command(run_config, tmp_path, monkeypatch, capsys):
    """``command("--data", folder, tasks="a,b")``: exit code and what a tiny run into ``tmp_path / "run"`` prints."""
    monkeypatch.setattr(simulation, "raise_on_signals", lambda: None)

    def call(*arguments, **changes):
        sizes = {"dataset": "super-ni", "num-rows": 100, "server-rows": 21, "eval-rows": 9, "num-experts": 3}
        values = run_config({**sizes, "output-dir": str(tmp_path / "run"), "num-server-rounds": 1, **changes})
        (tmp_path / "values.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
        every = ["--app", "experiments.super_ni", "--backend", "inline", "-c", str(tmp_path / "values.toml")]
        code = simulation.run([*every, *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_folder_of_task_files_is_run_on_from_end_to_end(command, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("--data", folder.name)
    assert (code, err) == (0, "")
    run = RunFolder.open(tmp_path / "run")
    assert run.config["data-path"] == str(folder), "a run elsewhere must find it"
    assert set(run.summary["perplexity"]) == {"all", *SIZES}
    assert run.summary["experts"] == [[task] for task in SIZES]
    assert (run.summary["dataset"], run.summary["data_is_sample"]) == ("super-ni", False)
    described = (
        f"task files of data (data-path), 3 tasks ({', '.join(SIZES)}), "
        "the server has 3 instead of 7 of task012_numbers"
    )
    assert run.summary["data_description"] == described
    assert f"data: {described}: 90 train, 9 test, 17 server rows" in out
    assert run.partition["tasks"] == list(SIZES)
    owned = [client["per-task"] for client in run.partition["clients"]]
    assert {task: sum(rows.get(task, 0) for rows in owned) for task in SIZES} == dict(
        zip(SIZES, (41, 41, 8), strict=True)
    )
    assert "task011 animals of the farm" in (tmp_path / "run/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"data-path": ""}, "There are no task files: give a checkout"),
        ({"data-path": "missing"}, "data-path names missing, which is no folder"),
        ({"tasks": "task010,task013"}, "`tasks` names 'task013', but there is no such task in"),
        ({"tasks": "task01*", "num-rows": 20}, "Task 'task012_numbers' has 12 rows, too few to train and test on"),
        ({"dataset": "dolly"}, "is neither .jsonl nor .jsonl.gz"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_returns_2_with_one_clear_line_and_leaves_no_folder(command, folder, tmp_path, changes, complaint):
    code, _, err = command(**{"data-path": str(folder), **changes})
    assert code == 2
    assert complaint in err
    assert err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


def test_broken_task_file_returns_2_and_is_named(command, folder):
    (folder / "task013_broken.json").write_text('{"Definition": ["Do."], "Instances": [')
    code, _, err = command("--data", folder)
    assert code == 2
    assert f"{folder / 'task013_broken.json'} cannot be read" in err
    assert err.count("\n") == 1, err
