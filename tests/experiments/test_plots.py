"""Plots are written where there is something to show, and what they show is what was logged."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from experiments import plots
from experiments.run_folder import RunFolder


def width_in_pixels(path: Path) -> int:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">I", head[16:20])[0]


@pytest.mark.parametrize("plot", [plots.plot_perplexity, plots.plot_gate, plots.plot_partition])
def test_every_plot_of_a_complete_run_is_a_png_of_readable_width(make_run, tmp_path: Path, plot) -> None:
    assert plot(make_run(), tmp_path / "plot.png")
    assert 900 <= width_in_pixels(tmp_path / "plot.png") <= 1000


@pytest.mark.parametrize("plot", [plots.plot_perplexity, plots.plot_gate, plots.plot_partition])
def test_nothing_is_written_for_a_run_that_measured_nothing(tmp_path: Path, plot) -> None:
    run = RunFolder.create(tmp_path / "run", {"method": "mops"})
    assert not plot(run, tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


def test_a_run_whose_perplexity_is_not_finite_is_still_drawn(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {"method": "mops"})
    for metric in ("perplexity", "perplexity-bare", "gate-expert-0"):
        for task in ("all", "open_qa"):
            run.log(round=0, client_steps=0, split="test", task=task, metric=metric, value=np.nan, seconds=0)
    assert plots.plot_perplexity(run, tmp_path / "perplexity.png")
    assert plots.plot_gate(run, tmp_path / "gate.png")


def test_gate_maps_have_an_expert_a_row_and_a_task_a_column(make_run) -> None:
    maps = plots.gate_maps(make_run().metrics())
    assert sorted(maps) == [0, 5, 10, 15, 20]
    np.testing.assert_allclose(maps[20].sum(axis=0), 1.0)
    np.testing.assert_allclose(np.diag(maps[20]), 1 / 7 + 0.6)
    assert maps[20][2, 5] == pytest.approx((1 - 1 / 7 - 0.6) / 6)


def test_expert_labels_name_all_its_tasks_or_its_number(make_run) -> None:
    run = make_run(summary={"experts": [["open_qa", "closed_qa"], []]})
    assert plots._expert_labels(run, 3) == ["open qa + closed qa", "1", "2"]


def test_labels_tell_runs_apart_by_seed_then_by_what_differs_then_by_place(make_run) -> None:
    runs = [
        make_run("a", seed=1),
        make_run("b", seed=2, lr=0.01),
        make_run("c", seed=2, lr=0.03),
        make_run("d", seed=2, lr=0.03),
        make_run("e", method="fedprompt", seed=2, lr=0.1),
    ]
    assert plots.run_labels(runs) == [
        "MoPs, seed 1",
        "MoPs, seed 2, lr 0.01",
        "MoPs, seed 2, lr 0.03, run 3",
        "MoPs, seed 2, lr 0.03, run 4",
        "FedPrompt, seed 2",
    ]


def test_comparison_is_drawn_for_several_methods(make_run, tmp_path: Path) -> None:
    runs = [make_run("a"), make_run("b", seed=2), make_run("c", method="fedprompt"), make_run("d", method="new")]
    assert plots.plot_comparison(runs, tmp_path / "comparison.png")
    assert width_in_pixels(tmp_path / "comparison.png") == 990


def test_long_task_names_are_cut_to_two_lines_and_joined_ones_keep_two_each(make_run) -> None:
    task = "task128_scan_structured_text_generation_command_action_short"
    run = make_run(summary={"experts": [[task], ["creative_writing", "summarization", "brainstorming"]]})
    assert plots._expert_labels(run, 2) == [
        "task128 scan structured\ntext generation …",
        "creative writing +\nsummarization +\nbrainstorming",
    ]
