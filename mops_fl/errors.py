"""The two errors that people are meant to read: the input is wrong, or the run cannot go on."""

import errno

# What whoever runs a command can mend; the system's other errors are faults of the program, or of a network.
_REFUSALS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT})


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


def refusal(error: OSError) -> str | None:
    """What is told of a full disk or a missing right, where nothing nearer to it has said more; None of other errors.

    Returns:
        One sentence.
    """
    if error.errno not in _REFUSALS:
        return None
    what = error.filename or "A file that this command writes"
    return f"{what}: {error.strerror}; check its permissions, and the room on its disk."
