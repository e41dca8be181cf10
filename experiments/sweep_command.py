"""`mops-fl sweep`: run what a sweep file names, skip what is done, go on with what was interrupted."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from experiments.central_run import run_centrally
from experiments.compress_command import prune_if_missing
from experiments.run_folder import ALL_TASKS
from experiments.runtimes import Backend, run_inline
from experiments.simulation import run_app
from experiments.sweep import Planned, Sweep, read_sweep
from experiments.sweep_table import write_sweep_report
from mops_fl.errors import InputError

BACKENDS: dict[str, Backend] = {"federated": run_inline, "central": run_centrally}
# Exit codes from here on are a signal's.
SIGNALLED = 128


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `sweep` to the parser of `mops-fl`."""
    parser = subparsers.add_parser("sweep", help="run the rows x methods x seeds of a TOML file, and make its table")
    parser.add_argument("file", type=Path, metavar="FILE", help="such as experiments/tables/dolly_federated.toml")
    parser.add_argument("--data", type=Path, metavar="PATH", help="as for flower-simulation")
    parser.add_argument("--output", type=Path, metavar="DIR", help="of the run folders (default: as FILE says)")
    parser.add_argument(
        "--only", metavar="PATTERN", default="*", help="runs whose folder's name matches, such as '75-*-seed0'"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run what is missing, one after the other, and write tables and curves.

    Returns:
        0; 1 if a run failed; 128 and the signal's number if interrupted.

    Raises:
        InputError: the file is not a sweep, a run's values are not valid, or a folder holds another run.
    """
    sweep = read_sweep(args.file, args.output)
    chosen = [one for one in sweep.runs if fnmatch(one.folder.name, args.only)]
    if not chosen:
        names = ", ".join(one.folder.name for one in sweep.runs)
        raise InputError(f"No run of the sweep matches {args.only!r}; there are: {names}.")
    states = {one.folder: one.status() for one in sweep.runs}
    code = _run_all(sweep, chosen, states, args.data)
    if any(state == "complete" for state in states.values()):
        print(write_sweep_report(sweep) + f"\nwritten: {sweep.output / sweep.name}.md")
    return code


def _run_all(sweep: Sweep, chosen: Sequence[Planned], states: dict[Path, str], data: Path | None) -> int:
    console = Console(file=sys.stdout)
    with _shown(console, chosen, states) as say:
        for one in chosen:
            if states[one.folder] == "complete":
                continue
            began = time.monotonic()
            say(one, "running")
            code = _run_one(sweep, one, states[one.folder], data)
            ended = "interrupted" if code >= SIGNALLED else f"failed, see {_log(one)}"
            states[one.folder] = ended if code else "complete"
            say(one, f"{states[one.folder]}, {(time.monotonic() - began) / 60:.1f} min")
            if code >= SIGNALLED:
                return code
    return int(any(states[one.folder] != "complete" for one in chosen))


def _run_one(sweep: Sweep, one: Planned, state: str, data: Path | None) -> int:
    """Run it, its output in a file beside its folder; returns its exit code."""
    if state == "broken":
        moved = one.folder.with_name(f"{one.folder.name}.broken-{datetime.now(UTC):%Y%m%d-%H%M%S}")
        one.folder.rename(moved)
    if resume := state == "interrupted":
        options: dict[str, object] = {"run_config": [], "resume": one.folder, "data": None}
    else:
        text = " ".join(f"{key}={json.dumps(value)}" for key, value in one.values.items())
        options = {"run_config": [text], "resume": None, "data": data}
    one.folder.parent.mkdir(parents=True, exist_ok=True)
    with _log(one).open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            if not resume:
                prune_if_missing({**one.values, **({"data-path": str(data)} if data else {})}, print)
        except InputError as error:
            print(f"mops-fl sweep: {error}", file=log)
            return 2
        args = argparse.Namespace(app=sweep.app, num_supernodes=None, **options)
        return run_app("mops-fl sweep", args, BACKENDS[one.training], resumable=True)


def _log(one: Planned) -> Path:
    return one.folder.with_name(f"{one.folder.name}.log")


class _Say:
    """Keeps the table on a terminal up to date, or prints a line where there is none."""

    def __init__(self, console: Console, runs: Sequence[Planned], states: dict[Path, str]) -> None:
        self._console = console
        self._rows = {one.folder: self._row(one, states[one.folder]) for one in runs}

    def __call__(self, one: Planned, state: str) -> None:
        self._rows[one.folder] = self._row(one, state)
        if not self._console.is_terminal:
            self._console.print(f"{one.folder.name}: {state}", markup=False, highlight=False, soft_wrap=True)

    def __rich__(self) -> Table:
        table = Table("row", "method", "seed", "status", "perplexity")
        for row in self._rows.values():
            table.add_row(*row)
        return table

    def _row(self, one: Planned, state: str) -> tuple[str, ...]:
        found = one.find() if state.startswith("complete") else None
        perplexity = f"{found.results()['perplexity'][ALL_TASKS]:.2f}" if found else ""
        return one.row, one.method, str(one.seed), state, perplexity


@contextlib.contextmanager
def _shown(console: Console, runs: Sequence[Planned], states: dict[Path, str]) -> Iterator[_Say]:
    say = _Say(console, runs, states)
    if console.is_terminal:
        with Live(say, console=console, refresh_per_second=1, redirect_stdout=False, redirect_stderr=False):
            yield say
    else:
        yield say
