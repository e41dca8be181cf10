"""`mops-fl sweep`: run what a sweep file names, skip what is done, go on with what was interrupted."""

import argparse
import contextlib
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TextIO

import tomli_w
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Column, Table

from experiments.central_run import run_centrally
from experiments.compress_command import prune_if_missing
from experiments.durable import writing
from experiments.runtimes import Backend, run_inline
from experiments.signals import SIGNALLED, exit_code
from experiments.simulation import run_app
from experiments.sweep import BROKEN, COMPLETE, ELSEWHERE, INTERRUPTED, Planned, Sweep, read_sweep
from experiments.sweep_cost import final_perplexity
from experiments.sweep_table import DIVERGED, write_sweep_report
from experiments.wording import perplexity_text
from mops_fl.errors import InputError

BACKENDS: dict[str, Backend] = {"federated": run_inline, "central": run_centrally}
RUNNING = "running"
# Lines of a table beside its rows, and the line that counts.
TABLE_FRAME = 4
COUNTS = 1


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sweep`."""
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
        0; 1 if a run failed or goes on elsewhere; 128 and the signal's number if interrupted.

    Raises:
        InputError: the file is not a sweep, a run's values are not valid, a folder holds another run, or the output
            cannot be written.
    """
    sweep = read_sweep(args.file, args.output, args.data)
    chosen = [one for one in sweep.runs if fnmatch(one.folder.name, args.only)]
    if not chosen:
        names = ", ".join(one.folder.name for one in sweep.runs)
        raise InputError(f"No run of the sweep matches {args.only!r}; there are: {names}.")
    states = {one.folder: one.status() for one in sweep.runs}
    code = _run_all(sweep, chosen, states)
    if any(state == COMPLETE for state in states.values()):
        print(write_sweep_report(sweep) + f"\nwritten: {sweep.output / sweep.name}.md")
    return code


def _run_all(sweep: Sweep, chosen: Sequence[Planned], states: dict[Path, str]) -> int:
    console = Console(file=sys.stdout)
    with _shown(console, chosen, states) as say:
        for one in chosen:
            state = states[one.folder] = one.status()  # anew: hours may have passed, and another sweep may be at it
            if state in (COMPLETE, ELSEWHERE):
                say(one, state)
                continue
            began = time.monotonic()
            say(one, RUNNING)
            code = _run_one(sweep, one, state)
            states[one.folder] = _ended(one, code)
            say(one, f"{states[one.folder]}, {(time.monotonic() - began) / 60:.1f} min")
            if code >= SIGNALLED:
                return code
    return int(any(states[one.folder] != COMPLETE for one in chosen))


def _ended(one: Planned, code: int) -> str:
    if code == 0:
        return COMPLETE
    if code >= SIGNALLED:
        return INTERRUPTED
    return ELSEWHERE if one.status() == ELSEWHERE else f"failed, see {_log(one)}"


def _run_one(sweep: Sweep, one: Planned, state: str) -> int:
    """Run it, its output in a file beside its folder; returns its exit code."""
    with (
        _open_log(one) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        tempfile.NamedTemporaryFile(suffix=".toml") as values,
    ):
        if state == INTERRUPTED:
            options: dict[str, object] = {"run_config": [], "resume": one.folder}
        else:
            if code := _prepare(one, state):
                return code
            tomli_w.dump(one.values, values)
            values.flush()
            options = {"run_config": [values.name], "resume": None}
        args = argparse.Namespace(app=sweep.app, num_supernodes=None, data=None, **options)
        return run_app("mops-fl sweep", args, BACKENDS[one.training], training=one.training)


def _prepare(one: Planned, state: str) -> int:
    """Make room for a run and prune its model where that is missing; returns the run's exit code, 0 to go on."""
    try:
        if state == BROKEN:
            one.set_aside()
        prune_if_missing(one.values, print)
    except InputError as error:
        print(f"mops-fl sweep: {error}")
        return 2
    except KeyboardInterrupt as interrupt:
        return exit_code(interrupt)
    except Exception:  # as `run_app` does: the other runs go on
        traceback.print_exc()
        return 1
    return 0


def _log(one: Planned) -> Path:
    return one.folder.with_name(f"{one.folder.name}.log")


def _open_log(one: Planned) -> TextIO:
    with writing(_log(one), "choose another --output", InputError):
        one.folder.parent.mkdir(parents=True, exist_ok=True)
        return _log(one).open("a", encoding="utf-8")


class _Say:
    """Keeps the table on a terminal up to date, or prints a line where there is none."""

    def __init__(self, console: Console, runs: Sequence[Planned], states: dict[Path, str]) -> None:
        self._console = console
        self._rows = {one.folder: self._row(one, states[one.folder]) for one in runs}
        self._states = {one.folder: states[one.folder] for one in runs}
        self._ended: list[Path] = []
        self.whole = False

    def __call__(self, one: Planned, state: str) -> None:
        self._rows[one.folder], self._states[one.folder] = self._row(one, state), state
        if state != RUNNING:
            self._ended.append(one.folder)
        if not self._console.is_terminal:
            self._console.print(f"{one.folder.name}: {state}", markup=False, highlight=False, soft_wrap=True)

    def __rich__(self) -> Table:
        """All rows; where the terminal is too low for them: those that run, the last that ended, and how many are what.

        With `whole` set it is all rows in any case.
        """
        table = _table(self._rows.values())
        if self.whole or len(self._console.render_lines(table)) <= self._console.height:
            return table
        running = [folder for folder, state in self._states.items() if state == RUNNING]
        room = max(self._console.height - TABLE_FRAME - COUNTS - len(running), 1)
        shown = [self._rows[folder] for folder in [*self._ended[-room:], *running]]
        table = _table(([part.partition(", see ")[0] for part in row] for row in shown), no_wrap=True)
        counts = Counter(state.partition(",")[0] for state in self._states.values())
        table.caption = f"{len(self._states)} runs: " + ", ".join(f"{count} {state}" for state, count in counts.items())
        return table

    def _row(self, one: Planned, state: str) -> tuple[str, ...]:
        found = one.find() if state.startswith(COMPLETE) else None
        final = final_perplexity(found) if found else None
        perplexity = "" if found is None else DIVERGED if final is None else perplexity_text(final)
        return one.row, one.method, str(one.seed), state, perplexity


def _table(rows: Iterable[Sequence[str]], no_wrap: bool = False) -> Table:
    names = ("row", "method", "seed", "status", "perplexity")
    table = Table(*(Column(name, no_wrap=no_wrap) for name in names))
    for row in rows:
        table.add_row(*map(escape, row))
    return table


@contextlib.contextmanager
def _shown(console: Console, runs: Sequence[Planned], states: dict[Path, str]) -> Iterator[_Say]:
    say = _Say(console, runs, states)
    if console.is_terminal:
        with Live(say, console=console, refresh_per_second=1, redirect_stdout=False, redirect_stderr=False):
            try:
                yield say
            finally:
                say.whole = True  # what stays on the terminal may be longer than it
    else:
        yield say
