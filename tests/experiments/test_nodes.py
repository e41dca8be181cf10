import time

import pytest
from flwr.app import Error, Message, RecordDict

from experiments import nodes
from experiments.nodes import RollCall, find_clients, numbered_as_before
from mops_fl.errors import InputError
from mops_fl.payload import ClientInfo, encode_info
from strategies.sampling import ClientSampler

pytestmark = pytest.mark.usefixtures("task_identity")


class FakeGrid:
    """Nodes that connect one by one, each time one looks; the answers are ready-made."""

    def __init__(self, answers, seconds_between=0.0):
        self.answers = answers
        self.seconds_between = seconds_between
        self.looks = 0
        self.asked = []
        self.began = time.monotonic()

    def get_node_ids(self):
        self.looks += 1
        if not self.seconds_between:
            return list(self.answers)
        connected = int((time.monotonic() - self.began) / self.seconds_between)
        return list(self.answers)[:connected]

    def send_and_receive(self, messages, *, timeout):
        self.asked.append(len(messages))
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{message.metadata.dst_node_id}"
            answer = self.answers[message.metadata.dst_node_id]
            if answer is not None:
                yield Message(answer, reply_to=message)


def info(partition_id, num_examples=4):
    return encode_info(ClientInfo(partition_id, num_examples, "shared", "weights", data_sha256="rows"))


def test_clients_are_found_in_order_of_their_partition_ids():
    clients = find_clients(
        FakeGrid({50: info(2), 70: info(0, 9), 60: info(1)}), 3, "weights", "rows", patience_seconds=0.1
    )
    assert list(clients) == [70, 60, 50]
    assert clients[70] == ClientInfo(0, 9, "shared", "weights", data_sha256="rows")


def test_every_node_is_asked_who_it_is_some_at_a_time(monkeypatch):
    monkeypatch.setattr(nodes, "_QUESTIONS_AT_ONCE", 2)
    grid = FakeGrid({10 + i: info(i) for i in range(5)})
    assert list(find_clients(grid, 5, "weights", "rows", patience_seconds=0.1)) == [10, 11, 12, 13, 14]
    assert grid.asked == [2, 2, 1]


def test_waits_as_long_as_nodes_keep_arriving():
    # Four nodes, one every 0.15 s: longer in all than the patience, but never from one to the next.
    grid = FakeGrid({10 + i: info(i) for i in range(4)}, seconds_between=0.15)
    assert len(find_clients(grid, 4, "weights", "rows", patience_seconds=0.4)) == 4
    assert grid.looks > 2
    assert time.monotonic() - grid.began > 0.55


def test_too_few_nodes_are_an_input_error_after_the_patience():
    grid = FakeGrid({10: info(0), 11: info(1)})
    with pytest.raises(InputError, match="2 SuperNodes are connected, but num-clients is 3"):
        find_clients(grid, 3, "weights", "rows", patience_seconds=0.1)
    assert 0.1 < time.monotonic() - grid.began < 5


@pytest.mark.parametrize(
    ("answers", "complaint"),
    [
        ({10: info(0), 11: info(0)}, r"\[0, 0\], not 0 to 1 once each"),
        ({10: info(1), 11: info(2)}, r"\[1, 2\], not 0 to 1 once each"),
        ({10: info(0), 11: info(1), 12: info(2)}, r"\[0, 1, 2\], not 0 to 1 once each"),
        (
            {10: info(0), 11: encode_info(ClientInfo(1, 4, "a", "others"))},
            "Node 11 cannot take part: it has other weights",
        ),
        (
            {10: info(0), 11: encode_info(ClientInfo(1, 4, "a", "weights", data_sha256="sample"))},
            "Node 11 cannot take part: it has other rows than the server, .* give its machine the same data",
        ),
        ({10: info(0), 11: None}, "Node 11 cannot take part: no answer in time"),
        ({10: info(0), 11: Error(code=2, reason="no partition-id")}, "Node 11 cannot take part: no partition-id"),
    ],
    ids=["same twice", "not from 0", "one too many", "other weights", "other rows", "one silent", "one failed"],
)
def test_nodes_that_are_not_the_clients_are_an_input_error(answers, complaint):
    with pytest.raises(InputError, match=complaint):
        find_clients(FakeGrid(answers), 2, "weights", "rows", patience_seconds=0.1)


def sampler_of(clients):
    return ClientSampler(clients, clients_per_round=1, cohort_size=1, seed=0)


def test_client_that_came_back_as_another_node_is_asked_there():
    sampler = sampler_of({10: ClientInfo(0, 4, "a", "weights"), 11: ClientInfo(1, 4, "b", "weights")})
    assert RollCall(sampler, "weights", "rows")(FakeGrid({10: info(0), 77: info(1)})) == {10, 77}
    assert sampler.node_of == {0: 10, 1: 77}


def test_clients_with_rows_of_their_own_are_known_again_by_them():
    def own(**per_task):
        return ClientInfo(-1, sum(per_task.values()), "new", "weights", per_task)

    before = find_clients(
        FakeGrid({n: encode_info(own(qa=n, chat=1)) for n in (10, 11, 12)}), 3, "weights", "rows", patience_seconds=0.1
    )
    sampler = sampler_of(before)
    back = {10: info(0), 77: encode_info(own(qa=12, chat=1)), 78: encode_info(own(qa=12, chat=1))}
    assert RollCall(sampler, "weights", "rows")(FakeGrid(back)) == {10, 77, 78}
    # Two say that they are the third; one is believed. Nobody is the second.
    assert sampler.node_of == {0: 10, 1: 11, 2: 77}


def test_stranger_that_claims_to_be_a_connected_client_is_not_believed():
    sampler = sampler_of({10: ClientInfo(0, 4, "a", "weights"), 11: ClientInfo(1, 4, "b", "weights")})
    RollCall(sampler, "weights", "rows")(FakeGrid({10: info(0), 77: info(0)}))
    assert sampler.node_of == {0: 10, 1: 11}


@pytest.mark.parametrize(
    "answer",
    [
        None,
        Error(code=2, reason="it broke"),
        RecordDict(),
        encode_info(ClientInfo(1, 4, "b", "other weights", data_sha256="rows")),
        encode_info(ClientInfo(1, 4, "b", "weights", data_sha256="other rows")),
    ],
)
def test_stranger_that_does_not_say_who_it_is_does_no_harm(answer):
    sampler = sampler_of({10: ClientInfo(0, 4, "a", "weights"), 11: ClientInfo(1, 4, "b", "weights")})
    assert RollCall(sampler, "weights", "rows")(FakeGrid({10: info(0), 77: answer})) == {10, 77}
    assert sampler.node_of == {0: 10, 1: 11}


def test_nobody_is_questioned_while_all_are_there():
    sampler = sampler_of({10: ClientInfo(0, 4, "a", "weights")})
    grid = FakeGrid({10: info(0), 77: Error(code=2, reason="never asked")})
    grid.send_and_receive = None
    RollCall(sampler, "weights", "rows")(grid)


def test_stranger_with_an_error_does_not_keep_those_out_that_are_back(caplog):
    sampler = sampler_of(
        {
            10: ClientInfo(0, 4, "a", "weights"),
            11: ClientInfo(1, 4, "b", "weights"),
            12: ClientInfo(2, 4, "c", "weights"),
        }
    )
    back = {10: info(0), 76: Error(code=2, reason="no rows"), 77: info(2)}
    assert RollCall(sampler, "weights", "rows")(FakeGrid(back)) == {10, 76, 77}
    assert sampler.node_of == {0: 10, 1: 11, 2: 77}
    assert "Node 76 cannot take part: no rows" in caplog.text


@pytest.mark.parametrize("started_again", [[93, 91, 92, 94], [94, 93, 92, 91], [13, 14, 11, 12]])
def test_resumed_run_numbers_its_clients_as_before_whatever_their_node_ids_are(started_again):
    organisations = {"a": {"qa": 50}, "b": {"qa": 7}, "c": {"chat": 9, "qa": 1}, "d": {"qa": 9, "chat": 1}}

    def found(node_ids):
        own = (ClientInfo(-1, sum(rows.values()), name, "weights", rows) for name, rows in organisations.items())
        answers = {node_id: encode_info(info) for node_id, info in zip(node_ids, own, strict=True)}
        return find_clients(FakeGrid(answers), 4, "weights", "rows", patience_seconds=0.1)

    def entry(info):
        return {"partition-id": info.partition_id, "per-task": {"chat": 0, "qa": 0, "poetry": 0} | info.own_rows}

    begun = {"clients": [entry(info) for info in found([12, 11, 14, 13]).values()]}
    again = numbered_as_before(found(started_again), begun)
    assert [(info.trainer, info.partition_id) for info in again.values()] == [("b", 0), ("a", 1), ("d", 2), ("c", 3)]


def test_clients_with_the_same_counts_keep_the_order_of_their_node_ids_and_others_are_left_for_the_run_to_refuse():
    own = {node_id: ClientInfo(-1, 4, str(node_id), "weights", {"qa": 4}) for node_id in (21, 22)}
    own[23] = ClientInfo(-1, 9, "23", "weights", {"qa": 9})
    clients = find_clients(
        FakeGrid({n: encode_info(info) for n, info in own.items()}), 3, "weights", "rows", patience_seconds=0.1
    )
    rows = [9, 4, 4]
    begun = {"clients": [{"partition-id": number, "per-task": {"qa": rows[number]}} for number in range(3)]}
    assert [(node_id, info.partition_id) for node_id, info in numbered_as_before(clients, begun).items()] == [
        (23, 0),
        (21, 1),
        (22, 2),
    ]
    begun["clients"][1]["per-task"]["qa"] = 5
    assert numbered_as_before(clients, begun) == clients
    assert numbered_as_before(clients, {"clients": begun["clients"][:1]}) == clients
