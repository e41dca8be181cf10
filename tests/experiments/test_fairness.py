"""The hashes of weights and rows judge where runs have recorded them, else the keys that choose them."""

import pytest

from experiments.fairness import unfair_differences

WEIGHTS, ROWS = {"backbone_sha256": "a" * 64}, {"data_sha256": "b" * 64}


@pytest.mark.parametrize(
    ("summary", "change"),
    [(WEIGHTS, {"backbone": "/models/a-copy"}), (WEIGHTS, {"compression": "sparsegpt:75%@1a2b"}),
     (ROWS, {"data_seed": 7}), (ROWS, {"bare": 60.5})],
)  # fmt: skip
def test_what_came_to_the_same_is_no_difference(make_run, summary, change):
    assert unfair_differences([make_run("a", summary=summary), make_run("b", summary=summary, **change)]) == []


def test_keys_judge_where_only_one_run_has_the_hash(make_run):
    runs = [make_run("a", summary={**WEIGHTS, **ROWS}), make_run("b", backbone="other", data_seed=7)]
    assert unfair_differences(runs) == [
        "backbone (HuggingFaceTB/SmolLM2-135M-Instruct / other)",
        "rows (data-seed 0 / 7)",
    ]


def test_other_weights_and_rows_of_the_same_name_are_told_by_their_hashes(make_run):
    first = make_run("a", summary={**WEIGHTS, **ROWS})
    other = make_run("b", summary={"backbone_sha256": "c" * 64, "data_sha256": "d" * 64}, eval_rows=210)
    assert unfair_differences([first, other]) == [
        "backbone_sha256 (aaaaaaaa / cccccccc)",
        "rows (data_sha256 bbbbbbbb / dddddddd, eval-rows 0 / 210)",
    ]


def test_other_weights_are_told_by_those_that_recorded_a_hash(make_run):
    runs = [make_run("a", summary=WEIGHTS), make_run("b"), make_run("c", summary={"backbone_sha256": "c" * 64})]
    assert unfair_differences(runs) == ["backbone_sha256 (aaaaaaaa / cccccccc)"]


def test_hash_over_two_models_says_nothing_beside_one_of_the_backbone(make_run):
    other = {"backbone_sha256": "c" * 64}
    first, second = make_run("a", summary=WEIGHTS), make_run("b", summary=other, gate_embedding="reader")
    assert unfair_differences([first, second]) == []
    third = make_run("c", summary=WEIGHTS, gate_embedding="reader")
    assert unfair_differences([second, third]) == ["backbone_sha256 (cccccccc / aaaaaaaa)"]


def test_bare_model_tells_of_what_no_hash_does(make_run):
    runs = [make_run("a", summary={**WEIGHTS, **ROWS}), make_run("b", summary={**WEIGHTS, **ROWS}, bare=61.0)]
    assert unfair_differences(runs) == ["perplexity of the bare model (60.00 / 61.00)"]


def test_key_that_an_older_run_lacks_is_passed_over(make_run):
    assert unfair_differences([make_run("a"), make_run("b", server_weight=1.0)]) == []
