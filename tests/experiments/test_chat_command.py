"""`mops-fl chat` on a run of the tiny model: its answers are the library's."""

import io
import sys

import pytest

from experiments.cli import main
from mops_fl.encoding import Turn

NEW = ["--max-new-tokens", "8"]


@pytest.fixture
def chat(trained_run, capsys, monkeypatch):
    """``chat("line", ...)``: what the command prints on stdout and stderr for lines of input."""

    def talk(*lines, options=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        assert main(["chat", "--adapter", str(trained_run), *NEW, *options]) == 0
        return capsys.readouterr()

    return talk


def second_answer(model, first, instruction):
    """What transformers' `generate` says to an instruction after "Why?" and the first answer."""
    inputs = model.encode_turns([[Turn("Why?", "", first.strip()), Turn(instruction, "")]])
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return model.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_chat_keeps_the_conversation_until_it_is_told_to_forget(chat, model, library_answer):
    first = library_answer(model, "Why?")
    assert chat("Why?", "Who?").out == f"{first}\n{second_answer(model, first, 'Who?')}\n"
    assert chat("Why?", "/new", "Who?").out == f"{first}\n{library_answer(model, 'Who?')}\n"


@pytest.mark.parametrize("there", [True, False])
def test_lines_typed_at_a_terminal_can_be_edited_where_python_can(there, trained_run, capsys, monkeypatch):
    terminal = io.StringIO("Why?\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.delitem(sys.modules, "readline", raising=False)
    if not there:
        monkeypatch.setitem(sys.modules, "readline", None)
    assert main(["chat", "--adapter", str(trained_run), *NEW]) == 0
    assert (sys.modules.get("readline") is not None) == there


def test_chat_commands(chat, model, tmp_path, library_answer):
    path = tmp_path / "text.txt"
    path.write_text("A text.", encoding="utf-8")
    found = chat(f"/context {path}", "Sum up.", "/quit", "Never asked.")
    assert found.out == library_answer(model, "Sum up.", "A text.") + "\n"
    found = chat("/context nowhere.txt", "/what", "/gate", "Why?", options=["--max-new-tokens", "3"])
    assert "nowhere.txt cannot be read" in found.err
    assert "/quit" in found.err
    assert "brainstorming" in found.err
    assert "brainstorming" in chat("Why?", options=["--show-gate"]).err


def test_chat_forgets_what_does_not_fit_and_refuses_what_never_could(chat, model, library_answer):
    window = model.config.max_position_embeddings - 8 - 14  # new tokens, prompts
    long = "a" * (window - len("### Instruction:\n\n\n### Response:\n"))
    found = chat("Why?", long)
    assert found.out == f"{library_answer(model, 'Why?')}\n{library_answer(model, long)}\n"
    assert "longer than" in chat(long + "a").err
    # What was said before stays: the next answer is to both turns.
    second = second_answer(model, library_answer(model, "Why?"), "Who?")
    assert chat("Why?", long + "a", "Who?").out.splitlines()[-1] == second
