"""ROUGE-L and exact match in a sweep's report."""

import json

import pytest

from experiments.sweep_scores import EVALUATION, scores_markdown
from mops_fl.errors import InputError


@pytest.fixture
def evaluated(make_run):
    """``evaluated("name", rouge_l, exact_match)``: a run with the evaluation.json that `mops-fl evaluate` writes."""

    def make(name, rouge_l, exact_match, rows=140, seed=0):
        run = make_run(name, seed=seed)
        overall = {"rows": rows, "perplexity": 3.0, "rouge-l": rouge_l, "exact-match": exact_match}
        content = {"adapter": name, "data": "test rows", "max-new-tokens": 48, "tasks": {"all": overall}, "answers": []}
        (run.path / EVALUATION).write_text(json.dumps(content))
        return run

    return make


def test_scores_are_means_over_the_seeds_that_have_them(evaluated, make_run):
    finished = {
        ("dense", "FedPrompt"): [evaluated("a", 20.0, 5.0), evaluated("b", 30.0, 6.0, seed=1)],
        ("dense", "MoPs"): [evaluated("c", 22.0, 4.0), make_run("d", seed=1)],
        ("dense", "LoRA"): [make_run("e")],
    }
    text = "\n".join(scores_markdown(finished, num_seeds=2))
    assert "| dense | FedPrompt | 140 | 25.0 | 5.5 % |" in text
    assert "| dense | MoPs | 140 | 22.0 (1 of 2 seeds) | 4.0 % |" in text
    assert "LoRA" not in text
    assert "Not a fair comparison" not in text


def test_scores_on_other_rows_are_no_fair_comparison(evaluated):
    finished = {("dense", "FedPrompt"): [evaluated("a", 20.0, 5.0)], ("dense", "MoPs"): [evaluated("b", 1.0, 1.0, 70)]}
    assert "> Not a fair comparison" in "\n".join(scores_markdown(finished, 1))


def test_no_evaluation_is_no_table_and_a_torn_one_is_named(evaluated, make_run):
    assert scores_markdown({("dense", "MoPs"): [make_run("a")]}, 1) == []
    run = evaluated("b", 1.0, 1.0)
    (run.path / EVALUATION).write_text("{")
    with pytest.raises(InputError, match=r"evaluation\.json is not what"):
        scores_markdown({("dense", "MoPs"): [run]}, 1)
