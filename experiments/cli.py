"""`mops-fl`: everything around a run.

Only the module of the command that is called is imported: what some of them need takes seconds to load.
"""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # before anything imports flwr, which reads it then

from experiments.signals import SIGNALLED, exit_code
from mops_fl.errors import InputError, RunError, refusal

# Name of a command -> its module in this package, and what the help says of it.
COMMANDS = {
    "fetch": ("fetch_command", "download the backbone and Dolly into the cache, once"),
    "compress": ("compress_command", "prune the backbone once, for runs with that `compression`"),
    "train": ("train_command", "train centrally, on all rows, for as many steps as a federation"),
    "sweep": ("sweep_command", "run the rows x methods x seeds of a TOML file, and make its table"),
    "report": ("report_command", "make a run's plots and report.html again, or a sweep's tables and curves"),
    "compare": ("compare", "put runs side by side: table, gain in %%, curves in one plot"),
    "generate": ("generate_command", "answer instructions with a trained adapter"),
    "chat": ("chat_command", "talk with a trained adapter"),
    "evaluate": ("evaluate_command", "perplexity, ROUGE-L and exact match of a trained adapter on any rows"),
    "explore": (
        "explore_command",
        "a page in the browser: ask the bare model and runs side by side, watch the gate",
    ),
    "grow": ("grow_command", "add an expert for a held-out task, from few rows"),
    "certificates": ("certificates", "make the certificates and keys of a deployment"),
    "deploy-demo": ("deploy_demo_command", "deploy a SuperLink and SuperNodes on this machine, and run"),
}


def command() -> NoReturn:
    """Run one command and end the process; training that is still queued in threads must not keep it."""
    code = main()
    sys.stderr.flush()  # of stdout main has done it
    os._exit(code)


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
    words = sys.argv[1:] if argv is None else argv
    called = next((word for word in words if not word.startswith("-")), None)
    for name, (module, line) in COMMANDS.items():
        command = commands.add_parser(name, help=line)
        if name == called:
            importlib.import_module(f"experiments.{module}").add_options(command)
    args = parser.parse_args(words)
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
        return SIGNALLED + signal.SIGPIPE
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # as rich ends a program then, all else done
            return SIGNALLED + signal.SIGPIPE
        raise
    except OSError as error:
        if (reason := refusal(error)) is None:
            raise
        print(f"mops-fl: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print("mops-fl: interrupted", file=sys.stderr)
        return exit_code(interrupt)
    return code
