"""What an error reply says may be anything; what is shown of it is text, neither empty nor endless."""

from types import SimpleNamespace

import pytest
from flwr.app import Error

from mops_fl.foreign_text import MOST_CHARACTERS, error_text, one_line


def reply(reason):
    return SimpleNamespace(error=Error(code=2, reason=reason))


@pytest.mark.parametrize("reason", [None, "", "\n", "\x1b\x07"])
def test_a_reply_without_a_reason_is_named_by_its_code(reason):
    assert error_text(reply(reason)) == "error 2"


def test_a_terminal_finds_nothing_to_obey():
    assert error_text(reply("\x1b[31mred\x1b[0m \x1b]0;title\x07\nline")) == "red ]0;title\nline"


def test_a_long_reason_keeps_its_start_and_its_end():
    text = error_text(reply("first" + "x" * 1_000_000 + "last"))
    assert len(text) < MOST_CHARACTERS + 10
    assert text.startswith("first")
    assert text.endswith("last")


def test_in_a_sentence_a_value_is_one_short_line():
    assert one_line(["a\nb", "\x1b[31m"]) == str(["a\nb", "\x1b[31m"])
    assert one_line(ValueError("two\n lines\x07")) == "two lines"
    assert len(one_line("x" * 500)) == 203
