"""A sweep's table against figures worked out by hand: seeds that are missing, diverged, or took other steps."""

from pathlib import Path

import pytest

from experiments.sweep import Planned, Sweep
from experiments.sweep_scores import EVALUATION
from experiments.sweep_table import sweep_markdown, write_sweep_report
from experiments.wording import NOTHING
from mops_fl.errors import InputError

METHODS = ("FedPrompt", "MoPs")


@pytest.fixture
def sweep(tmp_path):
    runs = [Planned("dense", method, seed, "federated", {}, {}) for method in METHODS for seed in (0, 1, 2)]
    return Sweep("s", "Tiny", tmp_path, "app", ("dense",), METHODS, tuple(runs), {"dense": {"MoPs": 9.45}})


@pytest.fixture
def finals(make_run):
    """``finals("MoPs", 9.0, None)``: runs of seeds 0 and 1 that end at 9.0 and diverged."""

    def make(method, *values, **summary):
        runs = []
        for seed, value in enumerate(values):
            figures = {"perplexity": {"all": value}, **summary}
            runs.append(make_run(f"{method}{seed}", after=value or 20.0, seed=seed, summary=figures))
        return runs

    return make


def row_of(text):
    (line,) = [line for line in text.splitlines() if line.startswith("| dense |") and "60.00" in line]
    return line.strip("| ").split(" | ")


def test_missing_seeds_are_marked_and_the_gain_is_over_those_of_both(sweep, finals):
    finished = {("dense", "FedPrompt"): finals("FedPrompt", 10.0, 20.0, 30.0), ("dense", "MoPs"): finals("MoPs", 9.0)}
    text = sweep_markdown(sweep, finished)
    assert row_of(text) == ["dense", "60.00", "20.00 ± 10.00", "9.00 (9.45) (1 of 3 seeds)", "+10.0 %"]
    assert "gain of the mean over the seeds that both have; positive where the perplexity is lower" in text


def test_run_that_diverged_is_said_so_and_left_out_of_mean_and_gain(sweep, finals):
    first = finals("FedPrompt", 10.0, None, 30.0)
    text = sweep_markdown(sweep, {("dense", "FedPrompt"): first, ("dense", "MoPs"): finals("MoPs", 9.0, 5.0, 31.0)})
    assert row_of(text)[2:] == ["20.00 ± 14.14 (2 of 3 seeds, 1 diverged)", "15.00 ± 14.00 (9.45)", "+0.0 %"]
    text = sweep_markdown(sweep, {("dense", "FedPrompt"): first[1:2], ("dense", "MoPs"): []})
    assert row_of(text)[2:] == ["diverged (1 of 3 seeds)", f"{NOTHING} (9.45)", NOTHING]


@pytest.mark.parametrize(
    ("summary", "said"),
    [
        ({"backbone_sha256": "c" * 64}, "backbone_sha256 (aaaaaaaa / cccccccc)"),
        ({"dtype": "float32"}, "dtype (bfloat16 / float32)"),
        ({"perplexity_bare": {"all": 61.0}}, "perplexity of the bare model (60.00 / 61.00)"),
    ],
)
def test_runs_of_a_row_that_were_measured_on_something_else_are_no_fair_comparison(sweep, finals, summary, said):
    usual = {"backbone_sha256": "a" * 64, "dtype": "bfloat16"}
    first, alike = finals("FedPrompt", 10.0, **usual), finals("alike", 9.0, **usual)
    assert "fair" not in sweep_markdown(sweep, {("dense", "FedPrompt"): first, ("dense", "MoPs"): alike})
    other = finals("MoPs", 9.0, **{**usual, **summary})
    text = sweep_markdown(sweep, {("dense", "FedPrompt"): first, ("dense", "MoPs"): other})
    assert f"> Not a fair comparison: the runs of dense differ in: {said}.\n" in text


def test_value_that_an_older_run_of_a_row_lacks_is_no_difference(sweep, finals):
    newer = finals("MoPs", 9.0, backbone_sha256="a" * 64, data_sha256="b" * 64, dtype="bfloat16")
    text = sweep_markdown(sweep, {("dense", "FedPrompt"): finals("FedPrompt", 10.0), ("dense", "MoPs"): newer})
    assert "fair" not in text


def test_client_steps_are_named_where_they_differ(sweep, finals):
    same = {("dense", "FedPrompt"): finals("FedPrompt", 10.0), ("dense", "MoPs"): finals("MoPs", 9.0)}
    assert "Client steps differ" not in sweep_markdown(sweep, same)
    other = {**same, ("dense", "MoPs"): finals("more", 9.0, client_steps=440)}
    assert "Client steps differ: 400, but dense, MoPs: 440." in sweep_markdown(sweep, other)


def test_scores_stand_below_where_a_run_was_evaluated(sweep, finals):
    runs = finals("FedPrompt", 10.0)
    overall = {"rows": 140, "rouge-l": 20.0, "exact-match": 5.0}
    runs[0].write_json(EVALUATION, {"data": "test rows", "max-new-tokens": 48, "tasks": {"all": overall}})
    text = sweep_markdown(sweep, {("dense", "FedPrompt"): runs, ("dense", "MoPs"): []})
    assert "| dense | FedPrompt | 140 | 20.0 (1 of 3 seeds) | 5.0 % |" in text


def test_diverged_runs_are_reported_to_the_end(sweep, finals, monkeypatch):
    runs = finals("FedPrompt", None)
    for line in [{"round": 5, "value": float("nan")}]:
        runs[0].log(**line, client_steps=100, split="test", task="all", metric="perplexity", seconds=1.0)
    monkeypatch.setattr(Planned, "finished", lambda one: runs[0] if one.method == "FedPrompt" else None)
    assert "diverged" in write_sweep_report(sweep)


def test_output_that_cannot_be_written_is_one_sentence(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(Planned, "finished", lambda one: None)
    (tmp_path / "file").write_text("")
    unwritable = Sweep(**{**vars(sweep), "output": Path(tmp_path / "file" / "out")})
    with pytest.raises(InputError, match=r"cannot be written .* choose another --output"):
        write_sweep_report(unwritable)
