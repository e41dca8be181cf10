import itertools
import threading

import numpy as np
import pytest

from clients import trainer as module
from clients.trainer import Trainer
from mops_fl.errors import InputError
from mops_fl.model import PromptedModel
from mops_fl.payload import INPUT_PROMPTS, Cohort, TrainRequest

COHORT = (0, 3, 7)


def request(start, cohort=COHORT, server_round=1, input_prompts=None):
    changed = {} if input_prompts is None else {INPUT_PROMPTS: input_prompts}
    return TrainRequest(server_round, Cohort(cohort, 0, 1), start.adapter, {**start.frozen, **changed})


def bits(result):
    return [(name, array.tobytes()) for name, array in result.adapter.items()], result.loss_sum, result.gate_mass


@pytest.fixture
def trainer(run_config):
    return Trainer(run_config())


@pytest.fixture
def calls(monkeypatch):
    """How many clients each call of `train_cohort` trained."""
    sizes = []
    train_cohort = module.train_cohort

    def counted(model, state, clients, config):
        sizes.append(len(clients))
        return train_cohort(model, state, clients, config)

    monkeypatch.setattr(module, "train_cohort", counted)
    return sizes


def test_result_does_not_depend_on_who_of_the_cohort_asks_first(run_config):
    answers = []
    for order in itertools.permutations(COHORT):
        trainer = Trainer(run_config())
        start = trainer.prepare()
        results = {client: bits(trainer.train(client, request(start))) for client in order}
        answers.append([results[client] for client in COHORT])
    assert all(answer == answers[0] for answer in answers)
    assert len({str(answer) for answer in answers[0]}) == len(COHORT)


def test_result_does_not_depend_on_threads_that_ask_at_once(run_config, calls):
    cohorts = [(0, 3, 7), (1, 2), (5,)]
    one_by_one, at_once = Trainer(run_config()), Trainer(run_config())
    start = one_by_one.prepare()
    expected = {c: bits(one_by_one.train(c, request(start, cohort))) for cohort in cohorts for c in cohort}
    calls.clear()

    answers = {}
    barrier = threading.Barrier(6)

    def ask(client, cohort):
        barrier.wait()
        answers[client] = bits(at_once.train(client, request(start, cohort)))

    threads = [threading.Thread(target=ask, args=(c, cohort)) for cohort in cohorts for c in cohort]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert answers == expected
    assert sorted(calls) == [1, 2, 3]


def test_cohort_is_trained_once_and_a_repeated_request_gets_the_same_answer(trainer, calls):
    start = trainer.prepare()
    first = [bits(trainer.train(client, request(start))) for client in COHORT]
    again = [bits(trainer.train(client, request(start))) for client in COHORT]
    assert calls == [3]
    assert again == first
    trainer.train(0, request(start, server_round=2))
    trainer.train(0, request(start, cohort=(0,), server_round=2))
    assert calls == [3, 3, 1]


def test_next_round_trains_on_other_rows(trainer):
    start = trainer.prepare()
    first, second = (bits(trainer.train(0, request(start, server_round=number))) for number in (1, 2))
    assert first != second


def test_client_without_rows_is_refused_while_its_cohort_is_trained(run_config, calls):
    trainer = Trainer(run_config({"num-clients": 60}))
    counts = {client: trainer.describe(client).num_examples for client in range(60)}
    empty = next(client for client, count in counts.items() if count == 0)
    others = [client for client, count in counts.items() if count][:2]
    ask = request(trainer.prepare(), cohort=(others[0], empty, others[1]))
    with pytest.raises(InputError, match=f"Client {empty} has no rows"):
        trainer.train(empty, ask)
    assert [trainer.train(client, ask).num_examples for client in others] == [counts[client] for client in others]
    assert calls == [2]


def test_frozen_states_are_kept_between_rounds_until_the_input_prompts_change(run_config, monkeypatch):
    computed = []
    compute = PromptedModel._compute_states
    monkeypatch.setattr(
        PromptedModel, "_compute_states", lambda self, row: computed.append(row.row_id) or compute(self, row)
    )
    trainer = Trainer(run_config({"local-steps": 40, "num-clients": 10}))
    start = trainer.prepare()
    other_prompts = start.frozen[INPUT_PROMPTS] + np.float32(0.5)

    computed.clear()
    results = [trainer.train(0, request(start, cohort=(0,), server_round=number)) for number in (1, 2)]
    assert len(computed) == len(set(computed)) == trainer.describe(0).num_examples < 40

    changed = trainer.train(0, request(start, cohort=(0,), server_round=3, input_prompts=other_prompts))
    fresh = Trainer(run_config({"local-steps": 40, "num-clients": 10}))
    expected = fresh.train(0, request(start, cohort=(0,), server_round=3, input_prompts=other_prompts))
    assert bits(changed) == bits(expected)
    assert bits(changed) not in [bits(result) for result in results]


def test_every_training_row_belongs_to_exactly_one_client(trainer, run_config):
    counts = [trainer.describe(client).num_examples for client in range(10)]
    setting = trainer.setting()
    assert sum(counts) == setting.rows["train"] == 189  # 90 % of 210
    assert setting.rows["test"] == 14
    assert setting.rows["server"] == 35


def test_pretraining_depends_on_the_seed_alone(run_config):
    def start(seed):
        start = Trainer(run_config({"seed": seed})).prepare()
        return {name: array.tobytes() for name, array in {**start.adapter, **start.frozen}.items()}

    first, same, other = start(1), start(1), start(2)
    assert first == same
    assert all(first[name] != other[name] for name in first)


@pytest.mark.parametrize("partition_id", [-1, 10])
def test_unknown_client_is_refused(trainer, partition_id):
    with pytest.raises(InputError, match=f"no client {partition_id}: num-clients is 10"):
        trainer.describe(partition_id)
    with pytest.raises(InputError, match=f"no client {partition_id}: num-clients is 10"):
        trainer.train(partition_id, request(trainer.prepare(), cohort=(partition_id,)))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"data-path": "missing.jsonl"}, "missing.jsonl, which does not exist"),
        ({"data-path": "rows.csv"}, "neither .jsonl nor .jsonl.gz"),
        ({"backbone": "someone/no-such-model"}, "neither a local folder nor in the cache"),
        ({"inject-layer": 4}, "`inject-layer` is 4, but the backbone has layers 0 to 3"),
        ({"num-clients": 8, "partitioner": "natural-id"}, "set num-clients to 7"),
        ({"num-clients": 200, "partitioner": "iid"}, "200 clients and 189 rows"),
        ({"max-length": 499}, "with 14 prompts is more than the backbone's 512 positions; lower it to 498"),
        ({"num-experts": 8, "routing": "nearest"}, "`num-experts` is 8, .* set it to at most 7"),
    ],
)
def test_bad_setting_is_an_input_error(run_config, changes, complaint):
    with pytest.raises(InputError, match=complaint):
        Trainer(run_config(changes)).setting()


@pytest.mark.parametrize("line", ['{"instruction": "Why?"}', "not json"])
def test_bad_line_of_data_is_an_input_error(run_config, tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"Line 1 of .*rows\.jsonl"):
        Trainer(run_config({"data-path": str(path)})).setting()


def test_bad_config_is_refused_before_anything_is_loaded(run_config):
    with pytest.raises(InputError, match="gating"):
        Trainer({**run_config(), "gating": "none"})


def test_cohort_without_any_rows_is_refused(run_config):
    trainer = Trainer(run_config({"num-clients": 60}))
    empty = next(client for client in range(60) if trainer.describe(client).num_examples == 0)
    with pytest.raises(InputError, match=f"Client {empty} has no rows"):
        trainer.train(empty, request(trainer.prepare(), cohort=(empty,)))


def test_server_trains_on_its_own_rows_anew_in_each_round(trainer):
    start = trainer.prepare()
    first, again, second = (trainer.train_server(number, start.adapter, start.frozen) for number in (1, 1, 2))
    assert first.num_examples == trainer.setting().rows["server"] == 35
    assert bits(first) == bits(again) != bits(second)


@pytest.mark.parametrize(("rows", "count"), [("clients", 189), ("server", 35)])
def test_central_training_learns_from_the_rows_it_is_told_to(run_config, rows, count):
    trainer = Trainer(run_config({"central-rows": rows}))
    start = trainer.prepare()
    training = trainer.train_centrally(start.adapter, start.frozen, 3)
    training.advance(3)
    (result,) = training.results()
    assert (result.num_examples, result.num_steps) == (count, 3)


def test_cohort_that_failed_is_trained_when_it_is_asked_again(trainer, monkeypatch):
    ask = request(trainer.prepare())
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_cohort", lambda *_: (_ for _ in ()).throw(InputError("no room")))
        for client in COHORT:
            with pytest.raises(InputError, match="no room"):
                trainer.train(client, ask)
    assert trainer.train(0, ask).num_steps == 2


def test_seed_decides_the_order_of_rows_in_central_training(run_config):
    start = Trainer(run_config()).prepare()

    def trained(seed):
        training = Trainer(run_config({"seed": seed})).train_centrally(start.adapter, start.frozen, 3)
        training.advance(3)
        (result,) = training.results()
        return bits(result)

    assert trained(0) == trained(0) != trained(1)
