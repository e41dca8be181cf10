from collections import Counter
from dataclasses import replace

import pytest

from mops_fl.errors import InputError
from mops_fl.payload import ClientInfo
from strategies.sampling import ClientSampler


def nodes(num_clients, *, first_node=100, reverse=False, empty=(), trainers=("shared",)):
    """Node id -> client; client ``i`` asks trainer ``i mod len(trainers)``."""
    clients = {
        first_node + i: ClientInfo(i, 0 if i in empty else i + 1, trainers[i % len(trainers)], "weights")
        for i in range(num_clients)
    }
    return dict(reversed(clients.items())) if reverse else clients


def rounds(clients, *, per_round=5, cohort_size=2, seed=0, count=20):
    sampler = ClientSampler(clients, clients_per_round=per_round, cohort_size=cohort_size, seed=seed)
    return [sampler.cohorts(number) for number in range(1, count + 1)]


def members(cohorts):
    return [client for cohort in cohorts for client in cohort.members]


def test_sample_depends_on_neither_node_ids_nor_their_order():
    expected = rounds(nodes(20))
    assert rounds(nodes(20, first_node=7)) == expected
    assert rounds(nodes(20, reverse=True)) == expected


def test_sample_depends_on_seed_and_round_alone():
    first = rounds(nodes(20), seed=1)
    assert rounds(nodes(20), seed=1) == first
    assert rounds(nodes(20), seed=2) != first
    assert len({tuple(members(cohorts)) for cohorts in first}) > 10
    # A later round does not depend on the earlier ones having been drawn: a resumed run samples the same clients.
    sampler = ClientSampler(nodes(20), clients_per_round=5, cohort_size=2, seed=1)
    assert sampler.cohorts(17) == first[16]


@pytest.mark.parametrize("cohort_size", [1, 2, 3, 5, 100])
def test_cohorts_share_out_the_sample_and_are_never_too_large(cohort_size):
    whole = rounds(nodes(20), cohort_size=100)
    for cohorts, (sample,) in zip(rounds(nodes(20), cohort_size=cohort_size), whole, strict=True):
        assert sorted(members(cohorts)) == list(sample.members)
        assert len(set(sample.members)) == 5
        sizes = [len(cohort.members) for cohort in cohorts]
        assert sizes == {1: [1] * 5, 2: [2, 2, 1], 3: [3, 2], 5: [5], 100: [5]}[cohort_size]
        assert [(cohort.number, cohort.count) for cohort in cohorts] == [(i, len(sizes)) for i in range(len(sizes))]


def test_cohort_never_mixes_trainers():
    clients = nodes(20, trainers=("gpu-0", "gpu-1", "gpu-2"))
    for cohorts, (sample,) in zip(rounds(clients, cohort_size=2), rounds(nodes(20), cohort_size=100), strict=True):
        trainers = [{client % 3 for client in cohort.members} for cohort in cohorts]
        assert all(len(trainer) == 1 for trainer in trainers)
        assert all(len(cohort.members) <= 2 for cohort in cohorts)
        assert sorted(members(cohorts)) == list(sample.members)
        # Numbers and counts are the trainer's own.
        for one in trainers:
            numbers = [cohort.number for cohort, trainer in zip(cohorts, trainers, strict=True) if trainer == one]
            assert numbers == list(range(len(numbers)))
            counts = {cohort.count for cohort, trainer in zip(cohorts, trainers, strict=True) if trainer == one}
            assert counts == {len(numbers)}


def test_clients_without_rows_are_never_sampled_and_the_others_equally_often():
    counts = Counter(client for cohorts in rounds(nodes(10, empty=(0, 4, 9)), count=700) for client in members(cohorts))
    assert set(counts) == {1, 2, 3, 5, 6, 7, 8}
    # 700 rounds of 5 out of 7: 500 each, standard deviation 12.
    assert all(440 < count < 560 for count in counts.values())


def test_only_clients_with_rows_have_a_node():
    sampler = ClientSampler(nodes(4, empty=(2,)), clients_per_round=1, cohort_size=1, seed=0)
    assert sampler.node_of == {0: 100, 1: 101, 3: 103}


def test_more_clients_per_round_than_have_rows_are_refused():
    assert sorted(members(rounds(nodes(6, empty=(0,)), count=1)[0])) == [1, 2, 3, 4, 5]
    with pytest.raises(InputError, match="`clients-per-round` is 5, but only 4 of 6 clients have rows"):
        rounds(nodes(6, empty=(0, 3)))


def test_client_that_moved_is_asked_at_its_new_node_and_trained_by_its_new_trainer():
    sampler = ClientSampler(nodes(2), clients_per_round=2, cohort_size=2, seed=0)
    before = sampler.clients[1]
    sampler.move(1, 555, "elsewhere")
    assert sampler.node_of == {0: 100, 1: 555}
    assert sampler.clients[1] == replace(before, trainer="elsewhere")
    assert {cohort.members for cohort in sampler.cohorts(1)} == {(0,), (1,)}
