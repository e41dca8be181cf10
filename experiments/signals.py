"""Signals that end a program in order, and the exit codes that tell of them."""

import signal
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Exit codes from here on are a signal's.
SIGNALLED = 128


def raise_on_signals() -> None:
    """From now on SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread.

    Once: what is then being ended in order is not cut short by a second one.
    """

    def stop(number: int, _: FrameType | None) -> None:
        for other in ENDING:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    for number in ENDING:
        signal.signal(number, stop)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """The exit code of a program that `raise_on_signals`, or Ctrl-C alone, has interrupted."""
    return SIGNALLED + int(interrupt.args[0] if interrupt.args else signal.SIGINT)
