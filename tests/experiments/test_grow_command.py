"""An expert more for a held-out task, on a run of the tiny model."""

import errno
import json

import numpy as np
import pytest
from rich.console import Console

from experiments import grow_command
from experiments.app_folder import AppFolder
from experiments.cli import main
from experiments.runtimes import run_inline
from mops_fl.adapter_folder import load_adapter
from mops_fl.mops_model import MopsModel

pytestmark = pytest.mark.usefixtures("command_in_process")


@pytest.fixture
def trained(run_config, tmp_path):
    """``trained(key=value)``: a run's folder."""

    def call(**changes):
        values = run_config(
            {"output-dir": str(tmp_path / "run"), **{k.replace("_", "-"): v for k, v in changes.items()}}
        )
        run_inline(AppFolder.find("experiments.dolly"), values, catch_signals=lambda: None)
        return tmp_path / "run"

    return call


def test_grown_adapter_has_an_expert_more_and_the_others_as_they_were(trained, tmp_path, capsys):
    run = trained(held_out_tasks="closed_qa", num_experts=6)
    assert main(["grow", str(run), "--rows", "4", "--steps", "5"]) == 0
    printed = capsys.readouterr().out
    assert "closed qa" in printed
    folder = tmp_path / "run-closed_qa"
    old, new = load_adapter(run / "adapter"), load_adapter(folder)
    assert new.description.experts == (*old.description.experts, ("closed_qa",))
    assert new.description.adapter.num_experts == 7
    for name, array in old.arrays.items():
        assert np.array_equal(new.arrays[name][: len(array)], array), name
    assert new.arrays["prompts"].shape == (14, 32)
    growth = json.loads((folder / "growth.json").read_text())
    assert (growth["task"], growth["rows"], growth["steps"]) == ("closed_qa", 4, 5)
    assert set(growth["perplexity"]) == set(growth["perplexity_before"]) == {*old.description.tasks, "all"}
    summary = json.loads((run / "summary.json").read_text())
    assert growth["perplexity_before"] == pytest.approx(summary["perplexity"], rel=1e-5)
    assert summary["held_out_tasks"] == ["closed_qa"]
    assert summary["experts"] == [[task] for task in old.description.tasks[:6]]
    assert MopsModel.from_pretrained(folder).gate(
        MopsModel.from_pretrained(folder).encode(["Hi"])["input_ids"]
    ).shape == (1, 7)


@pytest.mark.parametrize(
    ("changes", "options", "complaint"),
    [
        ({"method": "fedprompt", "held_out_tasks": "closed_qa"}, [], "has no gate to grow"),
        ({}, [], "'No task' is not among the held-out tasks"),
        ({"held_out_tasks": "closed_qa"}, ["--task", "open_qa"], "'open_qa' is not among the held-out tasks"),
        ({"held_out_tasks": "closed_qa"}, ["--rows", "0"], "`rows` is 0"),
    ],
)
def test_what_cannot_be_grown_is_refused(trained, capsys, changes, options, complaint):
    run = trained(num_server_rounds=1, **changes)
    capsys.readouterr()
    assert main(["grow", str(run), *options]) == 2
    errors = capsys.readouterr().err
    assert complaint in errors
    assert errors.count("\n") == 1


def test_an_output_that_cannot_be_written_is_refused_before_the_training(trained, tmp_path, capsys, monkeypatch):
    run = trained(held_out_tasks="closed_qa", num_experts=6, num_server_rounds=1)
    (tmp_path / "file").touch()
    monkeypatch.setattr(grow_command, "_grow", lambda *_: pytest.fail("trained"))
    assert main(["grow", str(run), "--output", str(tmp_path / "file" / "grown")]) == 2
    assert "cannot be written (Not a directory); choose another --output" in capsys.readouterr().err


def test_output_of_the_current_folder_is_named_after_it(make_usable_run, tmp_path, monkeypatch):
    run = make_usable_run("run", held_out_tasks="closed_qa")
    monkeypatch.chdir(run.path)
    assert main(["grow", ".", "--rows", "1", "--steps", "1"]) == 0
    assert load_adapter(tmp_path / "run-closed_qa").card.startswith("run with one more expert, for closed qa")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"server_rows": 0}, "has no rows to tell 'closed_qa' from; train a run with server-rows above 0"),
        ({"server_rows": 1, "partitioner": "own-rows"}, "has no row of 'closed_qa' to learn from"),
    ],
)
def test_server_without_rows_is_refused_before_anything_is_loaded(
    make_usable_run, tmp_path, capsys, monkeypatch, changes, complaint
):
    run = make_usable_run("run", held_out_tasks="closed_qa", **changes)
    monkeypatch.setattr(grow_command, "_grow", lambda *_: pytest.fail("loaded"))
    assert main(["grow", str(run.path)]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "run-closed_qa").exists()


def test_full_disk_after_the_training_is_one_sentence(make_usable_run, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = make_usable_run("run", held_out_tasks="closed_qa")
    monkeypatch.setattr(MopsModel, "save_pretrained", full)
    assert main(["grow", str(run.path), "--rows", "1", "--steps", "1"]) == 2
    folder = tmp_path / "run-closed_qa"
    assert capsys.readouterr().err == (
        f"mops-fl: {folder} cannot be written (No space left on device); choose another --output.\n"
    )


def test_names_of_tasks_are_shown_as_they_are():
    perplexity = {"qa [easy]": 2.0, "x[/b]": 3.0, "all": 2.5}
    growth = grow_command.Growth("x[/b]", 1, 1, 0.1, 0, perplexity, perplexity, {})
    console = Console(width=100)
    with console.capture() as capture:
        console.print(grow_command._table(growth, ("qa [easy]", "x[/b]")))
    assert "qa [easy]" in capture.get()
    assert capture.get().count("x[/b]") == 2  # in the title too


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_that_no_generator_takes_is_refused_before_anything_is_made(seed, tmp_path, capsys):
    assert main(["grow", str(tmp_path / "run"), "--seed", str(seed)]) == 2
    assert f"`seed` is {seed}; it must be from 0 to 4294967295." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
