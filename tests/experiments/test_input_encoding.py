"""Questions that are not in UTF-8 are refused with a sentence, by `mops-fl generate` and by `chat`, which goes on."""

import io

import pytest

from experiments.cli import main

NEW = ["--max-new-tokens", "4"]


@pytest.fixture
def give(monkeypatch):
    """``give(b"...")``: what stands on stdin."""
    return lambda content: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


@pytest.mark.parametrize(("prompt", "stdin"), [("Sch\udcf6n?", b""), ("-", b"Why?\nSch\xf6n?\n")])
def test_generate_refuses_them(prompt, stdin, make_usable_run, give, capsys):
    give(stdin)
    assert main(["generate", "--adapter", str(make_usable_run().path), *NEW, prompt]) == 2
    errors = capsys.readouterr().err
    assert "give text in UTF-8" in errors
    assert errors.count("\n") == 1


def test_chat_says_so_and_answers_the_next_one(make_usable_run, give, capsys):
    chat = ["chat", "--adapter", str(make_usable_run().path), *NEW]
    give(b"Why?\n")
    assert main(chat) == 0
    expected = capsys.readouterr()
    give(b"Sch\xf6n?\nWhy?\n")
    assert main(chat) == 0
    found = capsys.readouterr()
    assert found.out == expected.out != ""
    assert "give text in UTF-8" in found.err
