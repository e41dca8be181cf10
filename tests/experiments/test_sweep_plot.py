"""What is drawn of a sweep is the mean of its seeds where all of them measured."""

import matplotlib.image
import pytest

from experiments.sweep_plot import curve_looks, mean_curve, plot_sweep


def test_mean_and_range_are_over_the_seeds_at_each_measurement(make_run):
    points, ranges = mean_curve([make_run("a", after=20.0), make_run("b", after=30.0, seed=2)])
    assert [point.client_steps for point in points] == [0, 100, 200, 300, 400]
    assert points[-1].value == pytest.approx(25.0)
    assert ranges[-1] == (pytest.approx(20.0), pytest.approx(30.0))


def test_measurement_that_a_seed_lacks_is_left_out(make_run):
    runs = [make_run("a"), make_run("b", seed=2)]
    runs[1].log(round=25, client_steps=500, split="test", task="all", metric="perplexity", value=9.0, seconds=1)
    assert [point.client_steps for point in mean_curve(runs)[0]] == [0, 100, 200, 300, 400]


def test_seeds_are_matched_by_round_where_their_client_steps_differ(make_run):
    runs = [make_run("a", after=20.0), make_run("b", after=30.0, seed=2)]
    lines = (runs[1].path / "metrics.jsonl").read_text().replace('"client-steps": 400', '"client-steps": 390')
    (runs[1].path / "metrics.jsonl").write_text(lines)
    points, _ = mean_curve(runs)
    assert points[-1] == (20, 395, pytest.approx(25.0))


def test_several_methods_have_a_panel_a_row_and_one_method_has_one_panel(make_run, tmp_path):
    mops, fedprompt = [make_run("a"), make_run("b", seed=2)], [make_run("c", method="fedprompt")]
    by_row = {("dense", "MoPs"): mops, ("dense", "FedPrompt"): fedprompt, ("75 %", "MoPs"): mops, ("2:4", "MoPs"): mops}
    alone = {(row, "MoPs"): mops for row in ("dense", "75 %", "2:4")}
    heights = []
    for finished in (by_row, alone):
        assert plot_sweep(finished, tmp_path / "plot.png")
        heights.append(matplotlib.image.imread(tmp_path / "plot.png").shape[0])
    assert heights[0] > 1.5 * heights[1]  # two lines of panels


def test_variants_of_a_method_share_its_colour_and_differ_by_line():
    looks = curve_looks({"FedPrompt": "fedprompt", "MoPs": "mops", "MoPs, gate frozen": "mops"})
    assert looks["MoPs"][0] == looks["MoPs, gate frozen"][0] != looks["FedPrompt"][0]
    assert looks["MoPs"][1] != looks["MoPs, gate frozen"][1]


def test_rows_of_one_method_differ_by_colour():
    assert len({colour for colour, _ in curve_looks({"dense": "mops", "2:4": "mops", "75 %": "mops"}).values()}) == 3


def test_nothing_is_written_where_no_run_is_complete(tmp_path):
    assert not plot_sweep({("dense", "MoPs"): []}, tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()
