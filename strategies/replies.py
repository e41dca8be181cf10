"""What a reply that brings no result says went wrong."""

from flwr.app import Message

from mops_fl.payload import printable

# A Python traceback that Ray and Flower passed on is a few thousand characters long.
MOST_CHARACTERS = 20_000


def error_text(reply: Message) -> str:
    """The reason that an error reply gives, never empty, in the form in which somebody else's text may be shown.

    Without what a terminal would obey, and cut in the middle if it is too long.
    """
    text = printable(reply.error.reason or "").strip()
    if len(text) > MOST_CHARACTERS:
        text = f"{text[: MOST_CHARACTERS // 2]}\n...\n{text[-MOST_CHARACTERS // 2 :]}"
    return text or f"error {reply.error.code}"
