"""Somebody else's text, in the form in which it may be shown: without what a terminal would obey, and not endless."""

import re

from flwr.app import Message

# A Python traceback that Ray and Flower passed on is a few thousand characters long.
MOST_CHARACTERS = 20_000


def printable(text: str) -> str:
    """The text without colours and other characters that a terminal would obey."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    return "".join(char for char in plain if char.isprintable() or char in "\n\t")


def one_line(value: object) -> str:
    """A value as it may stand in a sentence."""
    text = " ".join(printable(str(value)[:1000]).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def error_text(reply: Message) -> str:
    """The reason that an error reply gives, never empty, cut in the middle if it is too long."""
    text = printable(reply.error.reason or "").strip()
    if len(text) > MOST_CHARACTERS:
        text = f"{text[: MOST_CHARACTERS // 2]}\n...\n{text[-MOST_CHARACTERS // 2 :]}"
    return text or f"error {reply.error.code}"
