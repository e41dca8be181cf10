"""Plots are written where there is something to show, and what they show is what was logged."""

from __future__ import annotations

import struct
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from experiments import drawing, plots
from experiments.run_folder import RunFolder

TEXTS = {
    7: "task{:03d}_scan_structured_text_generation_command",
    20: "task{:04d}_some_dataset_name_answer_generation_{}",
}


def width_in_pixels(path: Path) -> int:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">I", head[16:20])[0]


@pytest.mark.parametrize("plot", [plots.plot_perplexity, plots.plot_gate, plots.plot_partition])
def test_every_plot_of_a_complete_run_is_a_png_of_readable_width(make_run, tmp_path: Path, plot) -> None:
    assert plot(make_run(), tmp_path / "plot.png")
    assert 900 <= width_in_pixels(tmp_path / "plot.png") <= 1000


@pytest.fixture
def drawn(monkeypatch, tmp_path: Path):
    """``drawn(plot, run)``: the figure that a plot has drawn."""
    figures = []

    @contextmanager
    def kept(target: Path, height: float):
        with drawing.drawn_figure(target, height) as figure:
            yield figure
        figures.append(figure)

    def draw(plot, run):
        assert plot(run, tmp_path / "plot.png")
        return figures[-1]

    monkeypatch.setattr(plots, "drawn_figure", kept)
    return draw


def run_of_long_names(path: Path, num_tasks: int) -> RunFolder:
    """A run of seven experts, among which tasks with names too long for a plot were dealt."""
    tasks = [TEXTS[num_tasks].format(number, number) for number in range(num_tasks)]
    run = RunFolder.create(path, {"method": "mops"})
    run.write_summary({"method": "mops", "experts": [tasks[expert::7] for expert in range(7)]})
    for number in (0, 1, 2):
        for place, task in enumerate(["all", *tasks]):
            point = {"round": number, "client_steps": 10 * number, "task": task, "seconds": 0.0}
            run.log(split="test", metric="perplexity", value=10.0 + place, **point)
            for expert in range(7):
                run.log(split="test", metric=f"gate-expert-{expert}", value=expert / 21, **point)
                run.log(split="train", metric=f"drift-expert-{expert}", value=0.1, **point)
            run.log(split="train", metric="drift", value=0.1, **point)
    return run


@pytest.mark.parametrize("plot", [plots.plot_perplexity, plots.plot_gate, plots.plot_drift])
@pytest.mark.parametrize("num_tasks", [7, 20])
def test_names_lie_inside_the_figure_and_not_upon_each_other(plot, num_tasks, drawn, tmp_path: Path) -> None:
    figure = drawn(plot, run_of_long_names(tmp_path / "run", num_tasks))
    texts = figure.findobj(lambda artist: isinstance(artist, Text) and any(map(str.isalpha, artist.get_text())))
    places = {text: text.get_window_extent() for text in texts if text.get_visible()}
    assert len(places) > 7
    for text, place in places.items():
        assert 0 <= place.x0 < place.x1 <= figure.bbox.x1, text
        assert 0 <= place.y0 < place.y1 <= figure.bbox.y1, text
    for (one, place), (other, its_place) in combinations(places.items(), 2):
        assert not place.overlaps(its_place), (one, other)


def test_no_two_of_many_curves_look_alike_and_the_one_of_all_tasks_is_named_first(drawn, tmp_path: Path) -> None:
    axes = drawn(plots.plot_perplexity, run_of_long_names(tmp_path / "run", 20)).axes[0]
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}
    assert len(looks) == len(axes.get_lines()) == 21
    assert len(set(axes.get_legend_handles_labels()[1])) == 21
    assert axes.get_legend().get_texts()[0].get_text() == "all tasks"


def test_figures_in_the_cells_of_the_gate_stand_out_from_them() -> None:
    def luminance(colour) -> float:
        parts = np.array(to_rgb(colour))
        linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    scores = np.sort([*np.linspace(0, 1, 50), *np.linspace(0.65, 0.78, 50)]).reshape(10, 10)
    axes = Figure().add_subplot()
    image = plots.draw_gate_map(axes, scores, [""] * 10, 1.0, 0)
    for text, score in zip(axes.texts, scores.flat, strict=True):
        shades = sorted([luminance(text.get_color()), luminance(image.to_rgba(score)[:3])])
        assert (shades[1] + 0.05) / (shades[0] + 0.05) >= 4.5


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


def test_experts_of_several_long_names_have_a_line_for_each_and_are_not_named_after_all_of_many(make_run) -> None:
    tasks = [f"task{number:04d}_some_dataset_name_answer_generation_{number}" for number in range(6)]
    first, second = plots._expert_labels(make_run(summary={"experts": [tasks[:2], tasks]}), 2)
    assert first == "task0000 so…neration 0 +\ntask0001 so…neration 1"
    assert second.splitlines()[-1] == "2 more"
    assert second.count("\n") == 4
