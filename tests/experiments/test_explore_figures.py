"""What the page shows beside answers is what the run measured, and what the gate gave the input."""

import json

import numpy as np
import pytest

from experiments.explore_figures import draw_gate, example_rows, perplexity_table
from experiments.run_folder import RunFolder
from mops_fl.config import DataConfig, read_section
from mops_fl.data import read_dolly
from mops_fl.sources import sample_path

EXPERTS = [f"expert_{number}" for number in range(7)]


def test_map_shows_the_last_evaluation_and_beside_it_the_marked_input(make_run):
    scores = [0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0]
    tasks, own = draw_gate(make_run(), EXPERTS, scores).axes[:2]
    (measured,), (given,) = tasks.get_images(), own.get_images()
    np.testing.assert_allclose(np.diag(measured.get_array()), 1 / 7 + 0.6)
    np.testing.assert_allclose(given.get_array(), np.array(scores)[:, None])
    assert measured.get_clim() == given.get_clim()
    assert [label.get_text() for label in tasks.get_yticklabels()] == [f"expert {number}" for number in range(7)]
    assert [label.get_text() for label in tasks.get_xticklabels()][:2] == ["creative\nwriting", "closed qa"]
    assert [label.get_text() for label in own.get_xticklabels()] == ["this input"]
    assert own.spines["left"].get_visible()
    assert not tasks.spines["left"].get_visible()
    assert tasks.get_xlabel().endswith("after round 20")


def test_map_before_any_input_has_an_empty_frame(make_run):
    own = draw_gate(make_run(), EXPERTS, None).axes[1]
    assert np.isnan(own.get_images()[0].get_array().filled(np.nan)).all()


def test_run_without_a_measured_gate_has_no_map(make_run):
    assert draw_gate(make_run(method="fedprompt"), EXPERTS, None) is None


def test_table_has_bare_before_and_after_with_the_lowest_bold(make_run):
    runs = [make_run("a", after=20.0), make_run("b", after=10.0)]
    lines = perplexity_table(runs, ["FedPrompt", "MoPs"]).splitlines()
    assert lines[0] == "| task | bare model | FedPrompt, before | FedPrompt | MoPs, before | MoPs |"
    assert lines[-1] == "| all tasks | 60.00 | 40.00 | 20.00 | 20.00 | **10.00** |"
    assert lines[3] == "| closed qa | 48.00 | 32.00 | 16.00 | 16.00 | **8.00** |"


def test_what_a_run_did_not_measure_is_a_dash(tmp_path, make_run):
    empty = RunFolder.create(tmp_path / "empty", {"method": "mops", "seed": 0})
    last = perplexity_table([make_run("a"), empty], ["a", "b"]).splitlines()[-1]
    assert last == "| all tasks | 60.00 | 40.00 | **20.00** | – | – |"  # noqa: RUF001


def test_examples_are_a_row_of_the_sample_for_each_of_the_runs_tasks(make_run, run_config):
    rows = example_rows(make_run(), read_section(DataConfig, run_config()))
    assert len(rows) == 7 == len({row.task for row in rows})
    assert set(rows) <= set(read_dolly(sample_path()))


@pytest.mark.parametrize("there", [True, False])
def test_run_on_other_tasks_shows_its_own_rows_if_they_are_there(there, tmp_path, run_config):
    values = run_config({"dataset": "super-ni", "data-path": str(tmp_path / "tasks"), "eval-rows": 0})
    run = RunFolder.create(tmp_path / "run", values)
    for task in ("task1_a", "task2_b"):
        run.log(round=0, client_steps=0, split="test", task=task, metric="perplexity", value=9.0, seconds=0)
        if there:
            write_task_file(tmp_path / "tasks" / f"{task}.json")
    rows = example_rows(run, read_section(DataConfig, values))
    assert [row.task for row in rows] == (["task1_a", "task2_b"] if there else [])


def write_task_file(path):
    path.parent.mkdir(exist_ok=True)
    instances = [{"id": f"{number}", "input": f"Question {number}?", "output": ["Yes."]} for number in range(40)]
    task = {
        "Contributors": [], "Source": [], "Categories": ["Question Answering"], "Definition": ["Answer."],
        "Input_language": ["English"], "Output_language": ["English"], "Positive Examples": [],
        "Negative Examples": [], "Instances": instances,
    }  # fmt: skip
    path.write_text(json.dumps(task), encoding="utf-8")
