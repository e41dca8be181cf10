import threading
import time
from itertools import pairwise

import pytest
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from experiments.inline import InlineGrid

pytestmark = pytest.mark.usefixtures("task_identity")


@pytest.fixture
def app():
    """Adds up, over its messages, what they hold; node 2 cannot."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        if context.node_id == 2:
            raise ArithmeticError("node 2 cannot add")
        total = context.state.metric_records.get("total", {"value": 0})["value"] + message.content["config"]["value"]
        context.state["total"] = MetricRecord({"value": total})
        facts = {"partition-id": context.node_config["partition-id"], "of": context.node_config["num-partitions"]}
        return Message(
            RecordDict(
                {"total": MetricRecord({"value": total}), "facts": ConfigRecord({**facts, **context.run_config})}
            ),
            reply_to=message,
        )

    return app


def ask(grid, **value_of_node):
    messages = [
        Message(
            RecordDict({"config": ConfigRecord({"value": value})}),
            dst_node_id=int(node.removeprefix("n")),
            message_type=MessageType.TRAIN,
        )
        for node, value in value_of_node.items()
    ]
    return {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(messages)}


def test_nodes_are_the_clients_in_order_and_know_the_run_config(app):
    grid = InlineGrid(app, 4, {"lr": 0.5})
    assert list(grid.get_node_ids()) == [1, 2, 3, 4]
    facts = {node: dict(reply.content["facts"]) for node, reply in ask(grid, n1=0, n4=0).items()}
    assert facts == {
        1: {"partition-id": 0, "of": 4, "lr": 0.5},
        4: {"partition-id": 3, "of": 4, "lr": 0.5},
    }


def test_exception_in_a_client_becomes_its_error_reply_with_the_traceback(app):
    replies = ask(InlineGrid(app, 3, {}), n1=1, n2=1, n3=1)
    assert [reply.has_error() for _, reply in sorted(replies.items())] == [False, True, False]
    error = replies[2].error
    assert error.code == 2
    assert "Traceback" in error.reason
    assert "ArithmeticError: node 2 cannot add" in error.reason


def test_state_of_a_client_lasts_and_is_its_own(app):
    grid = InlineGrid(app, 4, {})
    totals = []
    for value in (1, 10, 100):
        replies = ask(grid, n1=value, n3=2 * value)
        totals.append([replies[node].content["total"]["value"] for node in (1, 3)])
    assert totals == [[1, 2], [11, 22], [111, 222]]
    assert all(before != after for before, after in pairwise(totals))


def test_replies_are_pulled_by_the_ids_that_pushing_gave(app):
    grid = InlineGrid(app, 3, {})
    content = RecordDict({"config": ConfigRecord({"value": 5})})
    ids = list(grid.push_messages([grid.create_message(content, MessageType.TRAIN, node, "") for node in (3, 1)]))
    assert len(set(ids)) == 2
    (reply,) = pulled(grid, ids[1:])
    assert (reply.metadata.src_node_id, reply.metadata.reply_to_message_id) == (1, ids[1])
    (other,) = pulled(grid, ids[:1])
    assert other.metadata.src_node_id == 3


def pulled(grid, message_ids):
    while not (replies := list(grid.pull_messages(message_ids))):
        time.sleep(0.001)
    return replies


def test_reply_that_comes_after_the_time_limit_is_dropped_and_the_next_one_is_not_mistaken_for_it():
    app, late = ClientApp(), threading.Event()

    @app.train()
    def train(message, context):
        if message.content["config"]["value"] == 1 and context.node_id == 2:
            late.wait(30)
        return Message(
            RecordDict({"value": MetricRecord({"value": message.content["config"]["value"]})}), reply_to=message
        )

    def ask_both(value, timeout):
        content = RecordDict({"config": ConfigRecord({"value": value})})
        messages = [Message(content, dst_node_id=node, message_type=MessageType.TRAIN) for node in (1, 2)]
        replies = grid.send_and_receive(messages, timeout=timeout)
        return {reply.metadata.src_node_id: reply.content["value"]["value"] for reply in replies}

    grid = InlineGrid(app, 2, {})
    assert ask_both(1, timeout=0.5) == {1: 1}
    late.set()
    assert ask_both(2, timeout=30) == {1: 2, 2: 2}
