"""What a reply that brings no result says: whose it is, and what went wrong."""

import re
from collections.abc import Iterable

from flwr.app import Message

# A Python traceback that Ray and Flower passed on is a few thousand characters long.
MOST_CHARACTERS = 20_000


def node_asked(reply: Message, messages: Iterable[Message]) -> int:
    """The node that a reply is of: the sender, or that of the message to which the SuperLink answers in its place."""
    if not reply.has_error():
        return reply.metadata.src_node_id
    asked = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
    return asked.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)


def error_text(reply: Message) -> str:
    """The reason that an error reply gives, never empty, in the form in which somebody else's text may be shown.

    Without colours and other characters that a terminal would obey, and cut in the middle if it is too long.
    """
    plain = re.sub(r"\x1b\[[\d;]*m", "", reply.error.reason or "")
    text = "".join(char for char in plain if char.isprintable() or char in "\n\t").strip()
    if len(text) > MOST_CHARACTERS:
        text = f"{text[: MOST_CHARACTERS // 2]}\n...\n{text[-MOST_CHARACTERS // 2 :]}"
    return text or f"error {reply.error.code}"
