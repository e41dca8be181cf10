"""A run folder says again what was written into it, survives a kill, and names the file that is broken."""

from __future__ import annotations

import json
import math
import sys
import tomllib
from pathlib import Path

import pytest

from experiments import run_folder
from experiments.measurements import series, task_names
from experiments.run_folder import COPIED, RunFolder, output_dir
from mops_fl.errors import InputError

CONFIG = {"method": "mops", "seed": 3, "lr": 0.01, "resume": False}


def log(run, number, value, **other):
    entry = {"round": number, "client_steps": 10 * number, "split": "test", "task": "all", "metric": "perplexity"}
    run.log(**{**entry, "value": value, "seconds": 1.5, **other})


def test_create_writes_every_value_with_its_type_and_the_surroundings(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "new" / "run", CONFIG)
    manifest = tomllib.loads((tmp_path / "new/run/config.toml").read_text(encoding="utf-8"))
    assert manifest["config"] == CONFIG
    assert type(manifest["config"]["resume"]) is bool
    assert {"python", "numpy", "flwr"} <= manifest["versions"].keys()
    assert manifest["machine"]["memory-bytes"] > 2**20
    assert manifest["command"]
    assert manifest["started"].endswith("+00:00")
    assert RunFolder.open(tmp_path / "new/run").config == CONFIG


def test_each_process_that_goes_on_with_a_run_is_named_beside_the_first(tmp_path: Path, monkeypatch) -> None:
    first = RunFolder.create(tmp_path, CONFIG).manifest
    for version in ("98", "99"):
        monkeypatch.setattr(run_folder, "versions", lambda version=version: {"torch": version})
        RunFolder.open(tmp_path).write_resumed({**CONFIG, "seed": 4})
    found = RunFolder.open(tmp_path)
    assert [process["versions"] for process in found.manifest["resumed"]] == [{"torch": "98"}, {"torch": "99"}]
    assert found.manifest["resumed"][0].keys() == first.keys() - {"config"}
    assert {**found.manifest, "resumed": []} == {**first, "config": {**CONFIG, "seed": 4}, "resumed": []}


def test_create_takes_an_empty_folder_and_refuses_a_used_one(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG)
    before = (tmp_path / "config.toml").read_bytes()
    with pytest.raises(InputError, match="is not empty; name another folder"):
        RunFolder.create(tmp_path, {"method": "other"})
    assert (tmp_path / "config.toml").read_bytes() == before


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_dir({"dataset": "dolly", "method": "mops", "output-dir": "~/run"}) == tmp_path / "run"


def test_runs_started_together_have_folders_of_their_own() -> None:
    config = {"dataset": "dolly", "method": "mops", "output-dir": ""}
    first, second = output_dir(config), output_dir(config)
    assert first != second
    assert first.name.startswith("dolly-mops-")


def test_create_refuses_a_path_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        RunFolder.create(tmp_path / "file" / "run", CONFIG)


def test_a_line_has_the_contract_s_keys_and_null_for_nan(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, CONFIG)
    log(run, 2, math.nan, task="closed_qa")
    log(run, 3, math.inf)
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {
        "round": 2, "client-steps": 20, "split": "test", "task": "closed_qa", "metric": "perplexity",
        "value": None, "seconds": 1.5,
    }  # fmt: skip
    assert json.loads(lines[1])["value"] is None
    assert math.isnan(series(run.metrics(), "perplexity")[0].value)


def test_torn_last_line_is_skipped_and_rewinding_cuts_it_off(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, CONFIG)
    log(run, 0, 9.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 1, "client-st')
    assert [entry["round"] for entry in RunFolder.open(tmp_path).metrics()] == [0]
    RunFolder.open(tmp_path).rewind(0)
    log(run, 1, 8.0)
    assert [entry["value"] for entry in RunFolder.open(tmp_path).metrics()] == [9.0, 8.0]


def test_rewinding_drops_later_rounds_and_leaves_every_other_byte(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, CONFIG)
    for number, value in ((0, 9.0), (0, math.inf), (1, 1 / 3)):
        log(run, number, value)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    log(run, 2, 7.0)
    run.rewind(1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    run.rewind(-1)
    assert run.metrics() == []


def test_releases_are_counted_by_round_and_stay_when_the_run_is_rewound(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, CONFIG)
    assert not run.releases()
    for number in (1, 2, 2):
        run.note_release(number)
    run.rewind(-1)
    assert RunFolder.open(tmp_path).releases() == {1: 1, 2: 2}


def test_claim_removes_what_a_killed_process_had_not_finished_and_nothing_else(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, CONFIG)
    (tmp_path / "checkpoints").mkdir()
    for name in ("summary.json.1-2.partial", "checkpoints/a.safetensors.partial", "checkpoints/a.safetensors"):
        (tmp_path / name).write_text("half")
    run.claim().close()
    assert {path.name for path in tmp_path.rglob("*")} == {"config.toml", ".lock", "checkpoints", "a.safetensors"}


def test_series_is_in_order_of_rounds_and_a_repeated_round_counts_once(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, CONFIG)
    for number, value in ((0, 9.0), (10, 7.0), (5, 8.0), (10, 6.0)):
        log(run, number, value)
    log(run, 5, 1.0, task="open_qa")
    log(run, 5, 2.0, split="train", task="not_measured")
    assert series(run.metrics(), "perplexity") == [(0, 0, 9.0), (5, 50, 8.0), (10, 100, 6.0)]
    assert task_names(run.metrics()) == ["open_qa"]


@pytest.mark.parametrize("name", ["config.toml", "summary.json", "partition.json", "releases.json", "metrics.jsonl"])
def test_open_names_the_corrupt_file(make_run, name: str) -> None:
    run = make_run()
    (run.path / name).write_text("{ half a file\n")
    with pytest.raises(InputError, match=f"{name} is corrupt"):
        RunFolder.open(run.path)


def test_open_refuses_a_folder_that_no_run_has_left(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run folder"):
        RunFolder.open(tmp_path)


def test_summary_is_replaced_in_one_step(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    first = run.summary

    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run.write_summary({"status": "interrupted"})
    assert run.summary == first
    run.write_summary({"status": "complete", "perplexity": {"all": math.nan}})
    assert run.summary == {"status": "complete", "perplexity": {"all": None}}


def test_results_without_a_summary_come_from_the_configuration(make_run) -> None:
    run = make_run(ended=False)
    assert run.results() == {name: run.config[name] for name in COPIED if name in run.config} | {"status": "unfinished"}


def test_token_of_flowers_process_is_not_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["flwr-serverapp", "--token", "secret", "--run-once"])
    RunFolder.create(tmp_path / "run", {})
    assert "secret" not in (tmp_path / "run" / "config.toml").read_text()
    assert RunFolder.open(tmp_path / "run").manifest["command"] == ["flwr-serverapp", "--token", "***", "--run-once"]
