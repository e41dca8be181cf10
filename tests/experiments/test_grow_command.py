"""An expert more for a held-out task, on a run of the tiny model."""

import json

import numpy as np
import pytest

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
