"""What reaching the first method's perplexity cost, against sums worked out by hand.

A fabricated run's perplexity falls monotonically, measured after rounds 0, 5, 10, 15 and 20 of 20 steps each.
"""

import pytest

from experiments.sweep_cost import cost_cells, cost_to_reach
from experiments.wording import NOTHING


def log_rounds(run, **per_round):
    for number in range(1, 21):
        for metric, value in per_round.items():
            run.log(round=number, client_steps=20 * number, split="train", task="all",
                    metric=metric.replace("_", "-"), value=value, seconds=1000.0)  # fmt: skip


def test_every_seed_reaches_its_own_final_perplexity(make_run):
    runs = [make_run(f"run{seed}", after=after, seed=seed) for seed, after in enumerate((20.0, 22.0, 18.0))]
    assert cost_cells(runs, runs)[0] == "400"


def test_cost_is_the_median_of_the_seeds_that_reach_it_and_says_how_many(make_run):
    first = [make_run(f"first{seed}", after=20.0, seed=seed) for seed in range(4)]
    # Twice 10 is 20 but for rounding: reached after round 5; 19.9 only in the last round; 21 never.
    runs = [make_run(f"run{seed}", after=after, seed=seed) for seed, after in enumerate((10.0, 19.9, 21.0))]
    assert cost_cells(first, runs)[0] == "250 (2 of 3 seeds)"
    assert cost_cells(first, runs[2:]) == ["not reached", NOTHING, NOTHING, NOTHING]


def test_no_target_is_a_dash(make_run):
    run = make_run("run", seed=1)
    diverged = make_run("diverged", seed=1, summary={"perplexity": {"all": None}})
    for first in ([], [make_run("other", seed=2)], [diverged]):
        assert cost_cells(first, [run]) == [NOTHING] * 4


def test_time_and_bytes_are_those_of_the_rounds_of_training(make_run):
    run = make_run("run", after=10.0)
    log_rounds(run, round_seconds=2.0, bytes_up=1000.0, bytes_down=3000.0)
    assert cost_to_reach(run, 20.0) == (100, 10.0, 5000.0, 15000.0)
    assert cost_cells([make_run("first", after=20.0)], [run]) == ["100", "10.0 s", "5 kB", "15 kB"]


def test_older_run_has_the_share_of_its_totals(make_run):
    run = make_run("run", after=10.0, summary={"bytes_up": 400, "bytes_down": 800, "train_seconds": 80.0})
    assert cost_to_reach(run, 20.0) == (100, pytest.approx(20.0), 100, 200)
    # Resumed by a later version: some rounds' bytes are not known.
    run.log(round=5, client_steps=100, split="train", task="all", metric="bytes-up", value=7.0, seconds=1.0)
    assert cost_to_reach(run, 20.0).bytes_up == 100
