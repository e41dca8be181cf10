"""What an error reply says may be anything; what is shown of it is text, neither empty nor endless."""

import numpy as np
import pytest
from flwr.app import Error, Message

from strategies.fedprompt import FedPrompt
from strategies.replies import MOST_CHARACTERS, error_text


@pytest.fixture
def reply(ask):
    """``reply(reason)``: the error reply of a client that was asked."""
    asked = ask(FedPrompt, {"prompts": np.zeros((1, 2), np.float32)}, num_clients=1)
    return lambda reason: Message(Error(code=2, reason=reason), reply_to=asked.message_to(0))


@pytest.mark.parametrize("reason", [None, "", "\n", "\x1b\x07"])
def test_a_reply_without_a_reason_is_named_by_its_code(reply, reason):
    assert error_text(reply(reason)) == "error 2"


def test_a_terminal_finds_nothing_to_obey(reply):
    assert error_text(reply("\x1b[31mred\x1b[0m \x1b]0;title\x07\nline")) == "red ]0;title\nline"


def test_a_long_reason_keeps_its_start_and_its_end(reply):
    text = error_text(reply("first" + "x" * 1_000_000 + "last"))
    assert len(text) < MOST_CHARACTERS + 10
    assert text.startswith("first")
    assert text.endswith("last")
