"""`mops-fl chat`: talk with a trained adapter; earlier questions and answers stay before the next question."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.adapter_options import (
    add_adapter_options,
    add_generation_options,
    fix_sampling,
    load_model,
    print_gate,
    read_context,
    read_generation_options,
    require_room,
    require_utf8,
    room_for_question,
    stream_answer,
)
from mops_fl.errors import InputError

if TYPE_CHECKING:
    from transformers import BatchEncoding

    from mops_fl.encoding import Turn
    from mops_fl.mops_model import MopsModel

HELP = """\
/context FILE  the next question is about this text
/new           forget the conversation
/gate          show which experts fire, or no longer
/quit          leave (as Ctrl-D does); Ctrl-C ends an answer"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `chat`."""
    add_adapter_options(parser)
    add_generation_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer what is typed until it ends.

    Returns:
        The exit code, 0.

    Raises:
        InputError: If an option is out of range, or adapter or backbone are missing.
    """
    options = read_generation_options(args)
    model = load_model(args)
    fix_sampling(args)
    description = model.description
    print(f"{description.adapter.method} on {description.backbone.backbone}; /help lists the commands", file=sys.stderr)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # not every Python is built with it
            import readline  # noqa: F401 - gives `input` its editing of the line, and the earlier lines
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # else a wrong byte costs the lines that were read with it
    Chat(model, options, args.show_gate).loop()
    return 0


class Chat:
    """A conversation; what does not fit into the backbone's window is forgotten from its beginning."""

    def __init__(self, model: MopsModel, options: dict[str, Any], show_gate: bool) -> None:
        self._model = model
        self._options = options
        self._show_gate = show_gate
        self._context = ""
        self._turns: list[Turn] = []

    def loop(self) -> None:
        """Read lines until /quit or the end of the input."""
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line == "/quit":
                return
            try:
                self._command(line) if line.startswith("/") else self._ask(line)
            except InputError as error:
                print(error, file=sys.stderr)
            except KeyboardInterrupt:
                print()

    def _command(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if command == "/context" and argument:
            self._context = read_context(Path(argument.strip()).expanduser())
        elif command == "/new":
            self._turns, self._context = [], ""
        elif command == "/gate":
            self._show_gate = not self._show_gate
        else:
            print(HELP, file=sys.stderr)

    def _ask(self, instruction: str) -> None:
        from mops_fl.encoding import Turn

        if not instruction:
            return
        require_utf8(instruction)
        turn = Turn(instruction, self._context)
        inputs = self._fitting(turn)
        self._context = ""
        if self._show_gate:
            print_gate(self._model, inputs)
        answer = stream_answer(self._model, inputs, self._options)
        self._turns.append(Turn(turn.instruction, turn.context, answer.strip()))

    def _fitting(self, turn: Turn) -> BatchEncoding:
        num_new = self._options["max_new_tokens"]
        room = room_for_question(self._model, num_new)
        turns = list(self._turns)
        while (inputs := self._model.encode_turns([[*turns, turn]]))["input_ids"].shape[1] > room and turns:
            del turns[0]
        require_room(self._model, inputs, num_new)
        self._turns = turns
        return inputs
