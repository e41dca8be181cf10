"""The two errors that people are meant to read: the input is wrong, or the run cannot go on."""


class InputError(ValueError):
    """Bad input from outside: a config value, a file, a folder, an update from a client.

    The message is one sentence that says what is wrong and what to do. Commands print it without a traceback
    and exit with code 2.
    """


class RunError(RuntimeError):
    """The run cannot go on, through no fault of its input: no usable reply, a full disk, a trainer that keeps dying.

    What was done until the last complete round is kept. Commands print the message without a traceback and exit with
    code 1.
    """
