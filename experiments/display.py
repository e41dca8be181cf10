"""What a person sees while a run goes on: one line a round, and a bar with the time left on a terminal."""

import time
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from clients.setting import Setting
from experiments.run_folder import ALL_TASKS
from strategies.fedprompt import Failure, RoundReport


class Display:
    """Prints to a console; failures of the same text are shown in full once, then counted."""

    def __init__(self, console: Console, num_rounds: int, rounds_done: int) -> None:
        self._console = console
        self._num_rounds = num_rounds
        self._bar = Progress(
            TextColumn("[bold]round {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=num_rounds, completed=rounds_done, status="starting")
        self._shown: set[str] = set()
        self._rounds_began = time.monotonic()
        self._rounds_done = rounds_done

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, highlight=False, markup=False)

    def setting(self, setting: Setting) -> None:
        """The data, the model and the split."""
        if setting.data_is_sample:
            self.say(f"NOTE: the data is {setting.data_description}; give real data with data-path or MOPS_DOLLY.")
        rows = setting.rows
        self.say(
            f"data: {setting.data_description}: {rows['train']} train, {rows['test']} test, {rows['server']} server "
            f"rows, {rows['truncated']} truncated"
        )
        self.say(
            f"model: {setting.num_layers} layers, hidden {setting.hidden_size}, {setting.dtype} on {setting.device}"
        )

    def begin_rounds(self) -> None:
        """Preparations are over; the time left is reckoned from here."""
        self._rounds_began = time.monotonic()

    def round(self, report: RoundReport, client_steps: int, seconds: float) -> None:
        """A round's training."""
        totals = report.totals
        loss = totals["loss-sum"] / totals["num-tokens"]
        rate = totals["num-tokens"] / seconds
        seconds_per_round = (time.monotonic() - self._rounds_began) / (report.server_round - self._rounds_done)
        left = seconds_per_round * (self._num_rounds - report.server_round)
        failed = f", {len(report.failures)} clients failed" if report.failures else ""
        status = f"loss {loss:.3f}, {client_steps} client steps, {rate:.0f} tokens/s{failed}"
        self._bar.update(self._task, completed=report.server_round, status=status)
        self.say(f"round {report.server_round}/{self._num_rounds}: {status}, {left / 60:.1f} min left")
        for failure in report.failures:
            self._failure(failure)

    def evaluation(self, server_round: int, perplexity: Mapping[str, float]) -> None:
        """A measurement on the test rows."""
        self.say(f"  test perplexity after round {server_round}: {perplexity[ALL_TASKS]:.3f}")

    def _failure(self, failure: Failure) -> None:
        # The process differs from one failure to the next; the last line says what went wrong.
        last_line = failure.reason.splitlines()[-1]
        if last_line in self._shown:
            self.say(f"{failure.who}: as above")
        else:
            self._shown.add(last_line)
            self.say(f"{failure.who}: {own_traceback(failure.reason)}")


def own_traceback(reason: str) -> str:
    """The client's own traceback, without what Ray and Flower put around it when they pass it on."""
    return reason.partition("\n\nThe above exception was the direct cause")[0].strip()
