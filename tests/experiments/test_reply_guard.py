"""Of a node its answer is taken and nothing else; what cannot be read costs that answer alone."""

from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.server.superlink.fleet.message_handler import message_handler as fleet
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.simulation.run_simulation import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.superlink.servicer.runtime import runtime_handlers as runtime

from experiments.reply_guard import ReplyGuard
from mops_fl.foreign_text import error_text
from mops_fl.payload import to_record

pytestmark = pytest.mark.usefixtures("task_identity")


def question(node_id):
    return Message(RecordDict(), dst_node_id=node_id, message_type=MessageType.QUERY)


def value(number):
    return RecordDict({"config": ConfigRecord({"value": number})})


class FakeGrid:
    """Nodes with ready-made answers: content, an exception that pulling it raises, or None as long as none has come."""

    def __init__(self, answers, unreachable=()):
        self.answers = answers
        self.unreachable = unreachable
        self.connected = True
        self.sent = {}

    def get_node_ids(self):
        if not self.connected:
            raise ConnectionError("the SuperLink is gone")
        return list(self.answers)

    def push_messages(self, messages):
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"to-{message.metadata.dst_node_id}-{len(self.sent)}"
            if message.metadata.dst_node_id not in self.unreachable:
                self.sent[message.metadata.message_id] = message
        return [m.metadata.message_id if m.metadata.message_id in self.sent else "" for m in messages]

    def pull_messages(self, message_ids):
        """All or none: an exception for one of them is one for all, and what was pulled is gone."""
        come = [(self.sent[one], self.answers[self.sent[one].metadata.dst_node_id]) for one in message_ids]
        come = [(self.sent.pop(message.metadata.message_id), answer) for message, answer in come if answer]
        for _, answer in come:
            if isinstance(answer, Exception):
                raise answer
        replies = [Message(answer, reply_to=message) for message, answer in come]
        for reply in replies:  # as the SuperLink does for a node that is gone
            reply.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
        return replies


def ask(grid, *nodes, timeout=None):
    """What each node answered: a number, or the reason of an error."""
    replies = ReplyGuard(grid).send_and_receive([question(node) for node in nodes], timeout=timeout)
    return {reply.metadata.src_node_id: said(reply) for reply in replies}


def said(reply):
    return error_text(reply) if reply.has_error() else reply.content["config"]["value"]


def test_reply_that_cannot_be_read_is_an_error_of_its_own_node_and_the_others_arrive():
    answers = ask(
        FakeGrid({5: value(1), 6: TypeError("no \x1b[2Jshape"), 7: value(2), 8: Error(2, "no rows")}), 5, 6, 7, 8
    )
    assert answers == {
        5: 1,
        6: "refused: its reply cannot be read (TypeError: no [2Jshape)",
        7: 2,
        8: "no rows",
    }


def test_connection_that_breaks_is_nobodys_reply():
    grid = FakeGrid({5: TypeError("cut off")})
    grid.connected = False
    with pytest.raises(ConnectionError, match="the SuperLink is gone"):
        ask(grid, 5)


def test_node_that_no_message_can_be_sent_to_is_named():
    assert ask(FakeGrid({5: value(1), 6: value(2)}, unreachable={6}), 5, 6) == {
        5: 1,
        6: "the message to it could not be sent",
    }


def test_reply_that_comes_late_is_dropped_and_forgotten():
    grid = FakeGrid({5: value(1), 6: None})
    guard = ReplyGuard(grid)
    (reply,) = guard.send_and_receive([question(5), question(6)], timeout=0.01)
    assert said(reply) == 1
    assert len(grid.sent) == 1
    grid.answers = {6: value(2)}
    assert guard.send_and_receive([], timeout=1) == []
    assert not grid.sent


def test_message_outlives_the_longest_round():
    grid = FakeGrid({5: None})
    ReplyGuard(grid).push_messages([question(5)])
    assert next(iter(grid.sent.values())).metadata.ttl == 12 * 3600  # as long as nobody says how long to wait
    week = 7 * 24 * 3600.0
    grid = FakeGrid({5: value(1)})
    messages = [question(5)]
    ReplyGuard(grid).send_and_receive(messages, timeout=week)
    assert messages[0].metadata.ttl > week + 600


class SuperLink:
    """Flower's own: the state and the handlers of a SuperLink, without a network, and an `HttpGrid` that asks it."""

    def __init__(self):
        self.state = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory()).state()
        self.nodes = [self.state.create_node("owner", "owner", bytes([number]), 30.0) for number in range(3)]
        for node_id in self.nodes:
            self.state.activate_node(node_id, 30.0)
        self.run_id = self.state.create_run(
            "a/b", "1", "hash", {}, NOOP_FEDERATION_ID, None, "owner", TaskType.SERVER_APP
        )
        (run,) = self.state.get_run_info(run_ids=[self.run_id])
        self.state.claim_task(run.primary_task_id)
        self.state.activate_task(run.primary_task_id)
        TaskIdentity._task_id, TaskIdentity._run_id = run.primary_task_id, self.run_id
        TaskIdentity._node_id = SUPERLINK_NODE_ID
        self.grid = HttpGrid(token="token")
        task = SimpleNamespace(run_id=self.run_id, task_id=run.primary_task_id)
        handlers = {
            "GetNodes": runtime.get_nodes,
            "PushMessages": runtime.push_messages,
            "PullMessages": runtime.pull_messages,
            "PushObject": runtime.push_object,
            "PullObject": runtime.pull_object,
            "ConfirmMessageReceived": runtime.confirm_message_received,
        }
        self.grid._client = SimpleNamespace(
            **{
                name: lambda request, handler=handler: handler(request, self.state, task)
                for name, handler in handlers.items()
            }
        )
        self.grid.set_run(run)

    def push(self, message, reply):
        """What the node does that `message` was sent to; the SuperLink looks at the cover, not into the objects."""
        cover = Message(RecordDict(), reply_to=message)
        cover.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
        cover.metadata.__dict__["_message_id"] = reply.object_id
        objects = {object_id: one.deflate() for object_id, one in get_all_nested_objects(reply).items()}
        pushed = fleet.push_messages(
            PushMessagesRequest(messages_list=[message_to_proto(cover)], message_object_trees=[get_object_tree(reply)]),
            self.state,
        )
        for object_id in pushed.objects_to_push:
            request = PushObjectRequest(
                run_id=self.run_id,
                session_id=pushed.session_id,
                object_id=object_id,
                object_content=objects[object_id],
            )
            assert fleet.push_object(request, self.state).stored


def trained(number):
    return RecordDict({"arrays": to_record({"prompts": np.full(2, number, np.float32)})})


def values_of(replies):
    return {
        reply.metadata.src_node_id: "error" if reply.has_error() else reply.content["arrays"]["prompts"].numpy()[0]
        for reply in replies
    }


def test_malformed_object_costs_its_own_reply_alone_on_flowers_own_superlink():
    superlink = SuperLink()
    guard, (hostile, *honest) = ReplyGuard(superlink.grid), superlink.nodes
    messages = [question(node_id) for node_id in superlink.nodes]
    message_ids = guard.push_messages(messages)
    broken = Message(trained(9.0), reply_to=messages[0])
    array = broken.content["arrays"]["prompts"]
    array.__dict__["shape"] = ("x",)
    array.__dict__.pop("_object_id", None)
    for message, reply in zip(
        messages, [broken, *(Message(trained(1.0), reply_to=m) for m in messages[1:])], strict=True
    ):
        superlink.push(message, reply)
    assert values_of(guard.pull_messages(message_ids)) == {hostile: "error", **dict.fromkeys(honest, 1.0)}


def test_node_that_answers_in_anothers_name_is_known_on_flowers_own_superlink():
    superlink = SuperLink()
    guard, (hostile, victim, other) = ReplyGuard(superlink.grid), superlink.nodes
    messages = [question(node_id) for node_id in superlink.nodes]
    message_ids = guard.push_messages(messages)
    forged = Message(trained(9.0), reply_to=messages[1])
    assert forged.metadata.src_node_id == victim
    for message, reply in zip(
        messages, [forged, *(Message(trained(1.0), reply_to=m) for m in messages[1:])], strict=True
    ):
        superlink.push(message, reply)
    replies = guard.pull_messages(message_ids)
    assert values_of(replies) == {hostile: 9.0, victim: 1.0, other: 1.0}
    assert [reply.metadata.reply_to_message_id for reply in replies] == message_ids
