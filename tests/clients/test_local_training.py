import copy
import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message

from clients import local_training
from clients.local_training import ClientRows, Training, client_losses, draw_rows, train_cohort
from mops_fl.adapter import initial_state
from mops_fl.backbone import Backbone
from mops_fl.config import METHODS, PROMPTED, AdapterConfig, TrainConfig
from mops_fl.encoding import EncodedRow
from mops_fl.errors import InputError
from mops_fl.losses import RowLosses
from mops_fl.model import PromptedModel
from mops_fl.payload import ClientInfo, encode_result, from_record, to_record
from mops_fl.reply_check import ReplyLimits
from mops_fl.state_cache import StateCache
from mops_fl.weights import AdaptedModel, initial_weights
from strategies.aggregation import AggregationConfig, build_aggregate
from strategies.fedprompt import Acceptance
from strategies.registry import STRATEGIES
from strategies.sampling import ClientSampler

ADAPTER = AdapterConfig(
    method="mops", inject_layer=2, num_experts=3, prompts_per_expert=2, gating="attention", pooling="question",
    prompt_init="random", routing="gate", gate_width=8, gate_temperature=1.0, lora_rank=2, lora_alpha=4.0,
)  # fmt: skip
TRAIN = TrainConfig(lr=0.05, gate_lr_factor=1.0, batch_size=1, local_steps=3, local_epochs=0)


def encoded_row(row_id):
    rng = np.random.default_rng(row_id)
    length, prompt_length = 12 + row_id % 7, 5 + row_id % 3
    tokens = torch.from_numpy(rng.integers(0, 300, length))
    return EncodedRow(row_id, tokens, prompt_length, prompt_length, row_id % 3, truncated=False)


def client(number, num_rows):
    return ClientRows([encoded_row(100 * number + i) for i in range(num_rows)], seed=(0, 1, number))


@pytest.fixture
def build(tiny_model, byte_tokenizer):
    """``build(method)``: a model, and an adapter that changes what it does (a flat gate, or none, would hide much)."""

    def make(method, dtype=torch.float32):
        backbone = Backbone(tiny_model("llama").to(dtype), byte_tokenizer)
        config, generator = replace(ADAPTER, method=method), torch.Generator().manual_seed(2)
        if method in PROMPTED:
            prompts, cache = torch.randn(4, 32, generator=generator), StateCache(1 << 24)
            state = initial_state(config, torch.randn(6, 32, generator=generator), generator)
            changes = {name: tensor * 10 for name, tensor in state.items() if name == "gate.w2"}
            return PromptedModel(backbone, config, prompts, cache), state | changes
        state = initial_weights(backbone, config, generator)
        noise = {name: 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
        return AdaptedModel(backbone, config), {name: tensor + noise[name] for name, tensor in state.items()}

    return make


def assert_same_adapter(found, expected):
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "num_steps"),
    [
        pytest.param({"batch_size": 3}, [3, 3, 3, 3], id="all-together"),
        pytest.param({"local_steps": 9, "local_epochs": 3}, [6, 9, 3, 9], id="one-after-the-other-stops"),
        pytest.param({"local_steps": 9, "local_epochs": 1, "batch_size": 2}, [1, 4, 1, 4], id="two-and-two-stop"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_cohort_trains_each_client_as_if_it_were_alone(build, method, changes, num_steps):
    model, state = build(method)
    config = replace(TRAIN, **changes)
    clients = [client(number, num_rows) for number, num_rows in enumerate((2, 7, 1, 7))]
    together = train_cohort(model, state, clients, config)
    assert [result.num_steps for result in together] == num_steps
    for member, result in zip(clients, together, strict=True):
        (alone,) = train_cohort(model, state, [member], config)
        assert list(result.adapter) == list(alone.adapter) == list(state)
        assert_same_adapter(result.adapter, alone.adapter)
        np.testing.assert_allclose(result.gate_mass, alone.gate_mass, atol=1e-5)
        assert result.loss_sum == pytest.approx(alone.loss_sum, rel=1e-5)
        assert (result.num_steps, result.num_tokens) == (alone.num_steps, alone.num_tokens)
        assert result.num_examples == len(member.rows)
    # The clients differ, or the comparison would prove nothing.
    for one, other in itertools.combinations(together, 2):
        assert max(np.abs(one.adapter[name] - other.adapter[name]).max() for name in state) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_everything_trainable_moves_and_nothing_frozen_does(build, method, dtype):
    model, before = build(method, dtype)
    weights = {name: tensor.clone() for name, tensor in model.backbone.model.state_dict().items()}
    frozen = {name: tensor.clone() for name, tensor in vars(model).items() if isinstance(tensor, torch.Tensor)}
    given = copy.deepcopy(before)
    (result,) = train_cohort(model, given, [client(0, 4)], replace(TRAIN, local_steps=2))
    assert set(result.adapter) == set(before)
    for name, tensor in before.items():
        moved = np.abs(result.adapter[name] - tensor.numpy())
        assert result.adapter[name].dtype == np.float32
        assert moved.max() > 1e-3, name
        assert torch.equal(given[name], tensor), f"{name} of the global adapter was changed in place"
        # Each single row, too: a prompt that the injection drops would stay where it was.
        if tensor.dim() > 1 and not name.startswith("gate"):
            assert (moved.max(1) > 1e-3).all(), name
    assert all(torch.equal(getattr(model, name), tensor) for name, tensor in frozen.items())
    assert bool(frozen) == (method in PROMPTED)
    after = model.backbone.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    assert all(p.grad is None for p in model.backbone.model.parameters())


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
def test_gate_learns_at_its_share_of_the_prompts_rate(build, factor):
    # Adam's first step moves whatever has a gradient by its learning rate.
    (model, before), config = build("mops"), replace(TRAIN, gate_lr_factor=factor, local_steps=1)
    (result,) = train_cohort(model, before, [client(0, 4)], config)
    moved = {name: np.abs(result.adapter[name] - tensor.numpy()).max() for name, tensor in before.items()}
    assert moved.pop("prompts") == pytest.approx(0.05, rel=1e-3)
    for name, distance in moved.items():
        assert distance == pytest.approx(0.05 * factor, rel=1e-2, abs=0), name


def test_rows_come_once_a_pass_each_pass_in_a_new_order():
    member = client(3, 6)
    batches = list(itertools.islice(draw_rows(member, 4), 9))  # 36 rows: six passes
    assert all(len(batch) == 4 for batch in batches)
    drawn = [row.row_id for batch in batches for row in batch]
    passes = [drawn[first : first + 6] for first in range(0, 36, 6)]
    assert all(sorted(one) == [300, 301, 302, 303, 304, 305] for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_batch_larger_than_the_clients_rows_repeats_them():
    (batch,) = itertools.islice(draw_rows(client(0, 2), 6), 1)
    assert sorted(row.row_id for row in batch) == [0, 0, 0, 1, 1, 1]


def test_order_of_rows_is_fixed_by_the_seed_alone():
    def order(seed):
        batches = itertools.islice(draw_rows(replace(client(0, 8), seed=seed), 1), 24)
        return [row.row_id for (row,) in batches]

    assert order((0, 1, 2)) == order((0, 1, 2))
    assert len({tuple(order(seed)) for seed in ((0, 1, 2), (0, 1, 3), (0, 2, 2), (1, 1, 2))}) == 4


def test_seconds_of_a_cohort_are_shared_among_its_clients(build, monkeypatch):
    monkeypatch.setattr(local_training, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    results = train_cohort(*build("mops"), [client(number, 3) for number in range(4)], TRAIN)
    assert [result.seconds for result in results] == [0.25] * 4


@pytest.mark.parametrize("method", METHODS)
def test_metrics_are_sums_over_all_steps(build, method):
    # A rate so small that the adapter stays the same.
    config = TrainConfig(lr=1e-12, gate_lr_factor=1.0, batch_size=3, local_steps=4, local_epochs=0)
    (model, state), clients = build(method), [client(0, 5), client(1, 2)]
    results = train_cohort(model, state, clients, config)
    for member, result in zip(clients, results, strict=True):
        drawn = [row for batch in itertools.islice(draw_rows(member, 3), 4) for row in batch]
        with torch.no_grad():
            losses = [model.losses(model.adapter([state]), [row]) for row in drawn]
        assert len(drawn) == 12
        assert result.num_tokens == sum(len(row.token_ids) - row.prompt_length for row in drawn)
        assert result.loss_sum == pytest.approx(sum(loss.loss_sum.item() for loss in losses), rel=1e-5)
        assert (result.num_examples, result.num_steps) == (len(member.rows), 4)
        if method != "mops":
            assert result.gate_mass == ()
            continue
        np.testing.assert_allclose(result.gate_mass, sum(loss.scores[0] for loss in losses), rtol=1e-5)
        assert sum(result.gate_mass) == pytest.approx(12, abs=1e-4)  # one for each row trained on


def test_clients_loss_is_the_mean_over_its_rows_of_the_mean_over_tokens():
    losses = RowLosses(torch.tensor([6.0, 4.0, 1.0, 9.0]), torch.tensor([2.0, 4.0, 1.0, 3.0]), None)
    assert client_losses(losses, 2).tolist() == [2.0, 2.0]  # (3 + 1) / 2, (1 + 3) / 2
    assert client_losses(losses, 1).tolist() == [2.0]
    assert client_losses(losses, 4).tolist() == [3.0, 1.0, 1.0, 3.0]


@pytest.mark.usefixtures("task_identity")
@pytest.mark.parametrize("method", METHODS)
def test_one_client_federated_is_the_same_client_trained_centrally(build, method):
    (model, state), member = build(method), client(0, 4)
    config = TrainConfig(lr=0.02, gate_lr_factor=1.0, batch_size=2, local_steps=5, local_epochs=0)

    # Centrally, with Adam written out (betas 0.9 and 0.999, epsilon 1e-8).
    adapter = model.adapter([state])
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in adapter.trainable().items()}
    for step, batch in enumerate(itertools.islice(draw_rows(member, 2), 5), start=1):
        losses = [model.losses(adapter, [row]) for row in batch]
        loss = sum(one.loss_sum[0] / one.num_tokens[0] for one in losses) / 2
        gradients = torch.autograd.grad(loss, list(adapter.parameters()))
        with torch.no_grad():
            for (name, p), gradient in zip(adapter.trainable().items(), gradients, strict=True):
                mean, square = moments[name]
                mean.mul_(0.9).add_(0.1 * gradient)
                square.mul_(0.999).add_(0.001 * gradient**2)
                p -= 0.02 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)

    # Federated: one client, one round, uniform weights.
    sampler = ClientSampler({7: ClientInfo(0, 4, "shared", "weights")}, clients_per_round=1, cohort_size=1, seed=0)
    strategy = STRATEGIES[method](
        sampler,
        weighting="uniform",
        aggregate=build_aggregate(AggregationConfig("mean", 0.2, 0, 1, 0.0, 1)),
        acceptance=Acceptance(ReplyLimits(5, 2, 1000), 0.0, 1),
        frozen=to_record({}),
        rounds_done=0,
        on_round=lambda report: None,
        num_experts=replace(ADAPTER, method=method).num_gated,
        connected=lambda grid: {7},
    )
    sent = to_record({name: tensor.numpy() for name, tensor in state.items()})
    (message,) = strategy.configure_train(1, sent, ConfigRecord(), grid=None)
    (result,) = train_cohort(model, state, [member], config)
    message.metadata.__dict__["_message_id"] = "1"
    arrays, _ = strategy.aggregate_train(1, [Message(encode_result(result), reply_to=message)])

    assert_same_adapter(from_record(arrays), {name: p.detach()[0].numpy() for name, p in adapter.trainable().items()})


def fail_above(limit, error, model, monkeypatch):
    """Have `model.losses` run out of memory on more rows than `limit`."""
    losses = model.losses

    def limited(adapter, rows):
        if len(rows) > limit:
            raise error
        return losses(adapter, rows)

    monkeypatch.setattr(model, "losses", limited)


@pytest.mark.parametrize("method", METHODS)
def test_cohort_that_does_not_fit_is_trained_in_parts(build, method, monkeypatch, caplog):
    (model, state), clients = build(method), [client(number, 3) for number in range(5)]
    expected = train_cohort(model, state, clients, TRAIN)
    fail_above(2, torch.OutOfMemoryError("CUDA out of memory."), model, monkeypatch)  # two and three, then one and two
    for result, whole in zip(train_cohort(model, state, clients, TRAIN), expected, strict=True):
        assert_same_adapter(result.adapter, whole.adapter)
        assert (result.num_steps, result.num_tokens) == (whole.num_steps, whole.num_tokens)
    assert [message.partition(" do not")[0] for message in caplog.messages] == ["5 clients", "3 clients"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: 2 bytes."),
    ],
)
def test_client_that_does_not_fit_alone_is_an_input_error(build, monkeypatch, caplog, error):
    model, state = build("mops")
    fail_above(0, error, model, monkeypatch)
    with pytest.raises(InputError, match="lower `batch-size`, `max-length` or `cache-megabytes`"):
        train_cohort(model, state, [client(0, 3), client(1, 3)], TRAIN)
    assert "2 clients do not fit into memory together" in caplog.messages[0]


def test_other_errors_are_not_taken_for_a_lack_of_memory(build, monkeypatch):
    model, state = build("mops")
    fail_above(0, RuntimeError("shapes differ"), model, monkeypatch)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train_cohort(model, state, [client(0, 3), client(1, 3)], TRAIN)


@pytest.mark.parametrize("method", METHODS)
def test_training_that_was_looked_at_goes_on_as_if_it_had_not_been(build, method):
    (model, state), config = build(method), replace(TRAIN, local_steps=5)
    clients = [client(0, 9), client(1, 2)]
    at_once = train_cohort(model, state, clients, config)
    training = Training(model, state, clients, config)
    parts = []
    for num_steps in (1, 3, 1):
        training.advance(num_steps)
        parts.append(training.results())
    for j, result in enumerate(at_once):
        last = parts[-1][j]
        assert all((last.adapter[name] == array).all() for name, array in result.adapter.items())
        assert sum(part[j].num_steps for part in parts) == result.num_steps == 5
        assert sum(part[j].num_tokens for part in parts) == result.num_tokens
        assert sum(part[j].loss_sum for part in parts) == pytest.approx(result.loss_sum, rel=1e-12)
    assert not all((parts[0][0].adapter[name] == array).all() for name, array in at_once[0].adapter.items())
