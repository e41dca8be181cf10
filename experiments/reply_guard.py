"""A Grid that takes from a node its answer and nothing else: whose it is, and to what, is known from what was sent.

What a node sends is bytes of its own making. Flower's grids make objects of all replies at once, so that one that is
no message takes the others with it, and they believe the reply's own word on who sent it.
"""

import time
from collections.abc import Iterable
from typing import Any

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from mops_fl.foreign_text import one_line

# A message lives so much longer than its round: the machines' clocks may differ, and a reply may still be on its way.
_LIFE_AFTER_ROUND_SECONDS = 3600.0
_LONGEST_PAUSE_SECONDS = 3.0


class ReplyGuard(Grid):
    """Asks through another grid; whatever is wrong with a reply costs that reply alone."""

    def __init__(self, grid: Grid) -> None:
        """Put it around `grid`, which nobody else may ask at the same time."""
        self._grid = grid
        self._unanswered: dict[str, Message] = {}  # by message id

    def set_run(self, run: Run) -> None:
        """Of the grid within."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """Of the grid within."""
        return self._grid.run

    def create_message(self, *args: Any, **options: Any) -> Message:  # noqa: ANN401
        """Of the grid within."""
        return self._grid.create_message(*args, **options)

    def get_node_ids(self) -> Iterable[int]:
        """Of the grid within."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send; the ids of those that could be sent."""
        messages = list(messages)
        sent = set(self._grid.push_messages(messages))
        pushed = {message.metadata.message_id: message for message in messages if message.metadata.message_id in sent}
        self._unanswered |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The answers that have come to messages sent from here, each from the node that its message was sent to."""
        pulled = ((message_id, self._pull(message_id)) for message_id in message_ids)
        come = {message_id: reply for message_id, reply in pulled if reply}
        for message_id in come:
            del self._unanswered[message_id]
        return list(come.values())

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send, and wait for the answers; what comes later than `timeout` seconds is dropped."""
        self.pull_messages(list(self._unanswered))  # too late for its own round, it would only fill the memory
        messages = list(messages)
        for message in messages:
            if timeout is not None:
                message.metadata.ttl = timeout + _LIFE_AFTER_ROUND_SECONDS
        began = time.monotonic()
        waiting = self.push_messages(messages)
        lost = [message for message in messages if message.metadata.message_id not in self._unanswered]
        replies = [_failed(message, "the message to it could not be sent") for message in lost]
        while waiting:
            looked = time.monotonic()
            replies += self.pull_messages(waiting)
            waiting = [message_id for message_id in waiting if message_id in self._unanswered]
            waited, seconds = time.monotonic() - began, time.monotonic() - looked
            if timeout is not None and waited >= timeout:
                break
            # Looking takes a twentieth of the time at most, and a reply lies there for a hundredth of the round.
            pause = min(_LONGEST_PAUSE_SECONDS, max(0.001, waited / 100, 20 * seconds))
            time.sleep(pause if timeout is None else min(pause, timeout - waited))
        return replies

    def _pull(self, message_id: str) -> Message | None:
        """One message's answer; of one that cannot be read, an error that says so."""
        asked = self._unanswered[message_id]
        try:
            for reply in self._grid.pull_messages([message_id]):
                if reply.has_error():
                    return Message(reply.error, reply_to=asked)
                return Message(reply.content, reply_to=asked)
        except Exception as error:  # the reply's bytes may make anything fail
            self._grid.get_node_ids()  # fails too where it is the connection that is broken
            return _failed(asked, f"refused: its reply cannot be read ({type(error).__name__}: {one_line(error)})")
        return None


def _failed(asked: Message, reason: str) -> Message:
    return Message(Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason), reply_to=asked)
