"""`mops-fl`: everything around a run. Each command lives in the file of its name."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # before anything imports flwr, which reads it then

from experiments import (
    certificates,
    chat_command,
    compare,
    compress_command,
    deploy_demo_command,
    evaluate_command,
    explore_command,
    fetch_command,
    generate_command,
    grow_command,
    report_command,
    sweep_command,
    train_command,
)
from mops_fl.errors import InputError, RunError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; whatever ends it early is one sentence and an exit code.

    Returns:
        The command's own exit code; 1 if it cannot go on, 2 for bad input, 130 for Ctrl-C, 141 if nobody reads what it
        prints.
    """
    parser = argparse.ArgumentParser(
        "mops-fl",
        description="Fetch model and data, prune, train, sweep; report on runs, compare and use them; deploy.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    making = (fetch_command, compress_command, train_command, sweep_command)
    using = (report_command, compare, generate_command, chat_command, evaluate_command, explore_command, grow_command)
    deploying = (certificates, deploy_demo_command)
    for command in making + using + deploying:
        command.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except InputError as error:
        print(f"mops-fl: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"mops-fl: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # as `| head` leaves it; Python would complain again when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as interrupt:
        print("mops-fl: interrupted", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    return code
