"""`mops-fl` without a command that does something: what it says of itself, and of how a command ended."""

import errno
import re
import signal
import subprocess
import sys

import pytest

from experiments import generate_command
from experiments.cli import main
from mops_fl.errors import InputError, RunError


def help_of(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_tells_of_every_command_and_each_command_of_itself(capsys):
    commands = re.findall(r"^    ([a-z-]+)(?: |$)", help_of(capsys), re.MULTILINE)
    assert {"train", "sweep", "compare", "deploy-demo"} < set(commands)
    for command in commands:
        assert help_of(capsys, command).startswith(f"usage: mops-fl {command}")


@pytest.mark.parametrize(
    ("ending", "code", "sentence"),
    [
        (InputError("There is no adapter."), 2, "There is no adapter."),
        (RunError("The disk is full."), 1, "The disk is full."),
        (
            PermissionError(errno.EACCES, "Permission denied", "/closed"),
            1,
            "/closed: Permission denied; check its permissions, and the room on its disk.",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt(signal.SIGTERM), 143, "interrupted"),
    ],
)
def test_command_that_ends_early_says_so_in_one_sentence(capsys, monkeypatch, ending, code, sentence):
    def end(_):
        raise ending

    monkeypatch.setattr(generate_command, "run", end)
    assert main(["generate", "--adapter", "run", "hello"]) == code
    assert capsys.readouterr().err == f"mops-fl: {sentence}\n"


@pytest.mark.parametrize("printing", ["print('x')", "print('x' * 100_000)", "Console().print('x' * 100_000)"])
def test_pipe_that_nobody_reads_ends_a_command_without_a_word(printing):
    code = (
        "import sys; from rich.console import Console; from experiments import cli, generate_command\n"
        f"generate_command.run = lambda args: sys.stdin.read() and {printing} or 0\n"
        "sys.exit(cli.main(['generate', '--adapter', 'run', 'hello']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        process.stdin.write(b"go")
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == 128 + signal.SIGPIPE
