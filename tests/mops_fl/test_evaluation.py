import math

import pytest
import torch

from mops_fl import evaluation as evaluation_module
from mops_fl.adapter import PromptAdapter
from mops_fl.evaluation import Evaluation, evaluate, evaluate_bare, packed_batches
from mops_fl.model import PromptedModel
from mops_fl.state_cache import StateCache

TASKS = ("open_qa", "summarization", "brainstorming")


@pytest.fixture
def rows(make_row):
    """Rows of two of the three tasks, of very unequal numbers of response tokens."""
    lengths = [(10, 9, 0), (30, 5, 1), (12, 8, 0), (25, 3, 0), (9, 2, 1)]
    return [make_row(i, n, prompt_length, task) for i, (n, prompt_length, task) in enumerate(lengths)]


@pytest.fixture
def model(tiny_backbone, adapter_config):
    prompts = torch.randn(4, 32, generator=torch.Generator().manual_seed(5))
    return PromptedModel(tiny_backbone, adapter_config(), prompts, StateCache(0))


@pytest.fixture
def adapter(adapter_config, make_state):
    return PromptAdapter([make_state(adapter_config())])


def test_perplexity_is_exp_of_summed_loss_over_counted_tokens():
    evaluation = Evaluation(("a", "b", "c"), (6.0, 1.0, 0.0), (2, 5, 0), None)
    assert evaluation.perplexity() == {
        "all": pytest.approx(math.e),  # 7 nats over 7 tokens; the mean of the tasks' means would be 1.6
        "a": pytest.approx(math.exp(3)),
        "b": pytest.approx(math.exp(0.2)),
    }


def test_perplexity_that_no_float_holds_is_infinite():
    assert Evaluation(("a", "b"), (800.0, 2.0), (1, 2), None).perplexity()["a"] == math.inf


def test_sums_and_counts_are_those_of_the_rows_one_by_one(model, adapter, rows):
    evaluation = evaluate(model, adapter, rows, TASKS)
    losses = [model.losses(adapter, [row]).loss_sum.item() for row in rows]
    assert evaluation.num_tokens == (1 + 4 + 22, 25 + 7, 0)
    assert evaluation.loss_sum == pytest.approx((losses[0] + losses[2] + losses[3], losses[1] + losses[4], 0), rel=1e-5)
    figures = evaluation.perplexity()
    assert figures["all"] == pytest.approx(math.exp(sum(losses) / 59), rel=1e-5)
    assert figures["summarization"] == pytest.approx(math.exp((losses[1] + losses[4]) / 32), rel=1e-5)
    assert set(figures) == {"all", "open_qa", "summarization"}


def test_gate_is_the_mean_score_of_a_tasks_rows(model, adapter, rows):
    scores = [model.losses(adapter, [row]).scores[0] for row in rows]
    gate = torch.tensor(evaluate(model, adapter, rows, TASKS).gate)
    expected = [(scores[0] + scores[2] + scores[3]) / 3, (scores[1] + scores[4]) / 2, torch.zeros(3)]
    torch.testing.assert_close(gate, torch.stack(expected), rtol=0, atol=1e-5, check_dtype=False)


def test_without_a_gate_there_are_no_scores(model, adapter_config, make_state, rows):
    adapter = PromptAdapter([make_state(adapter_config(method="fedprompt"))])
    assert evaluate(model, adapter, rows, TASKS).gate is None
    assert evaluate_bare(model.backbone, rows, TASKS).gate is None


@pytest.mark.parametrize("batch_tokens", [1, 30, 40, 2048])
def test_batching_does_not_change_the_result(batch_tokens, model, adapter, rows, monkeypatch):
    expected = evaluate(model, adapter, rows, TASKS)
    monkeypatch.setattr(evaluation_module, "BATCH_TOKENS", batch_tokens)
    evaluation = evaluate(model, adapter, rows, TASKS)
    assert evaluation.num_tokens == expected.num_tokens
    assert evaluation.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)
    torch.testing.assert_close(torch.tensor(evaluation.gate), torch.tensor(expected.gate), rtol=0, atol=1e-5)


def test_order_of_the_rows_does_not_change_the_result(model, adapter, rows):
    forwards, backwards = evaluate(model, adapter, rows, TASKS), evaluate(model, adapter, rows[::-1], TASKS)
    assert forwards.loss_sum == pytest.approx(backwards.loss_sum, rel=1e-5)
    assert forwards.num_tokens == backwards.num_tokens


@pytest.mark.parametrize(
    ("batch_tokens", "batches"),
    [
        (40, [[0, 1], [2, 3], [4]]),  # 10 + 30, 12 + 25, 9
        (39, [[0], [1], [2, 3], [4]]),
        (29, [[0], [1], [2], [3], [4]]),  # row 1 is longer than a batch and goes alone
        (2048, [[0, 1, 2, 3, 4]]),
    ],
)
def test_batches_hold_as_many_rows_in_order_as_fit(batch_tokens, batches, rows, monkeypatch):
    monkeypatch.setattr(evaluation_module, "BATCH_TOKENS", batch_tokens)
    assert [[row.row_id for row in batch] for batch in packed_batches(rows)] == batches


def test_bare_model_has_hugging_faces_loss(model, rows, tiny_model):
    hugging_face, sums = tiny_model("llama"), [0.0, 0.0, 0.0]
    for row in rows:
        labels = row.token_ids.clone()
        labels[: row.loss_start] = -100
        mean = hugging_face(row.token_ids[None], labels=labels[None]).loss.item()
        sums[row.task] += mean * (len(row.token_ids) - row.loss_start)
    evaluation = evaluate_bare(model.backbone, rows, TASKS)
    assert evaluation.loss_sum == pytest.approx(sums, rel=1e-5)
    assert evaluation.num_tokens == (27, 32, 0)


def test_evaluation_builds_no_graph(model, adapter, rows, monkeypatch):
    seen, losses = [], model.losses
    monkeypatch.setattr(model, "losses", lambda *args: seen.append(losses(*args)) or seen[-1])
    evaluate(model, adapter, rows, TASKS)
    assert [result.loss_sum.requires_grad for result in seen] == [False]


def test_evaluation_changes_nothing(model, adapter, rows):
    before = adapter.states()[0]
    first, second = (evaluate(model, adapter, rows, TASKS) for _ in range(2))
    assert first == second
    assert all(torch.equal(tensor, adapter.states()[0][name]) for name, tensor in before.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in adapter.parameters())
