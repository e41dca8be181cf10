"""The inline backend: a Grid that calls the ClientApp in this very process, without Ray or a network."""

import traceback
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from mops_fl.config import Scalar

# Clients that wait for their cohort at once; enough for every cohort to have one of its members here.
_MAX_THREADS = 64


class InlineGrid(Grid):
    """`num_clients` virtual nodes, ids 1 to `num_clients`, that answer at once, each on a thread of its own.

    A client's `Context.state` lasts from message to message, and an exception in a client becomes an error reply, as
    in Flower's own runtimes.
    """

    def __init__(self, app: ClientApp, num_clients: int, run_config: Mapping[str, Scalar]) -> None:
        self._app = app
        self._contexts = {
            partition_id + 1: Context(
                run_id=1,
                node_id=partition_id + 1,
                node_config={"partition-id": partition_id, "num-partitions": num_clients},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for partition_id in range(num_clients)
        }
        self._replies: dict[str, Future[Message]] = {}
        self._threads = ThreadPoolExecutor(_MAX_THREADS)

    def set_run(self, run: Run) -> None:
        """Only the run given at the start is ever used."""

    @property
    def run(self) -> Run:
        """An unnamed run."""
        return Run.create_empty(1)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let the clients begin to answer; the answers wait to be pulled."""
        messages = list(messages)
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())  # replies refer to it
        self._replies |= {
            message.metadata.message_id: self._threads.submit(self._answer, message) for message in messages
        }
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Those answers to the given messages that have come."""
        come = [message_id for message_id in message_ids if self._replies[message_id].done()]
        return [self._replies.pop(message_id).result() for message_id in come]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, and pull what has come when all have answered or the time is over; what comes later is dropped."""
        message_ids = list(self.push_messages(messages))
        wait([self._replies[message_id] for message_id in message_ids], timeout)
        replies = self.pull_messages(message_ids)
        for message_id in message_ids:
            self._replies.pop(message_id, None)
        return replies

    def _answer(self, message: Message) -> Message:
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception:  # whatever a client raises becomes its error reply
            error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=traceback.format_exc())
            return Message(error, reply_to=message)
