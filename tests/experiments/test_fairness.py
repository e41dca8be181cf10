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


PROMPTS = {"num_experts": 7, "prompts_per_expert": 10, "inject_layer": 10, "prompt_init": "random",
           "input_prompts": True, "input_prompt_steps": 20, "input_prompt_lr": 0.01, "pooling": "question"}  # fmt: skip
CHANGES = [
    ({"num_experts": 3}, "prompts (70 / 30)"),
    ({"prompts_per_expert": 3}, "prompts (70 / 21)"),
    ({"inject_layer": 20}, "inject-layer (10 / 20)"),
    ({"prompt_init": "vocabulary"}, "prompt-init (random / vocabulary)"),
    ({"input_prompts": False}, "input-prompts (True / False)"),
    ({"input_prompt_steps": 2000}, "input-prompt-steps (20 / 2000)"),
    ({"input_prompt_lr": 0.1}, "input-prompt-lr (0.01 / 0.1)"),
    ({"pooling": "all"}, "pooling (all lets the answer's tokens into the gate)"),
    ({"seed": 2}, "seeds (1 / 2)"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_two_methods_of_prompts_start_alike_but_one_method_may_be_studied(make_run, change, said):
    first, other = make_run("a", method="fedprompt", **PROMPTS), make_run("b", **{**PROMPTS, **change})
    assert unfair_differences([first, other]) == [said]
    assert unfair_differences([make_run("c", **PROMPTS), other]) == []


def test_prompts_in_one_expert_or_seven_are_as_many(make_run):
    one = {**PROMPTS, "num_experts": 1, "prompts_per_expert": 70, "pooling": "all"}  # without a gate nothing is pooled
    assert unfair_differences([make_run("a", method="fedprompt", **one), make_run("b", **PROMPTS)]) == []


def test_method_without_prompts_shares_only_seeds_and_what_the_gate_may_see(make_run):
    lora = make_run("a", method="lora", **PROMPTS)
    assert unfair_differences([lora, make_run("b", **{**PROMPTS, "inject_layer": 20, "num_experts": 3})]) == []
    assert unfair_differences([lora, make_run("c", **{**PROMPTS, "pooling": "all", "seed": 2})]) == [
        "seeds (1 / 2)",
        "pooling (all lets the answer's tokens into the gate)",
    ]


def test_seeds_of_which_one_is_shared_are_no_difference(make_run):
    runs = [make_run("a", method="fedprompt"), make_run("b"), make_run("c", seed=2)]
    assert unfair_differences(runs) == []
