"""`mops-fl`: everything around a run. Each command lives in the file of its name."""

import argparse
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # before anything imports flwr, which reads it then

from experiments import (
    chat_command,
    compare,
    compress_command,
    evaluate_command,
    explore_command,
    fetch_command,
    generate_command,
    grow_command,
    report_command,
    sweep_command,
    train_command,
)
from mops_fl.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; bad input ends it with one sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        "mops-fl", description="Fetch model and data, prune, train, sweep; report on runs, compare and use them."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    making = (fetch_command, compress_command, train_command, sweep_command)
    using = (
        report_command, compare, generate_command, chat_command, evaluate_command, grow_command, explore_command,
    )  # fmt: skip
    for command in making + using:
        command.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
    except InputError as error:
        print(f"mops-fl: {error}", file=sys.stderr)
        return 2
    return code
