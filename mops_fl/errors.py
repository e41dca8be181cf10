"""The one error that means: the user's input is wrong, and here is what to do."""


class InputError(ValueError):
    """Bad input from outside: a config value, a file, a folder, an update from a client.

    The message is one sentence that says what is wrong and what to do. Commands print it without a traceback
    and exit with code 2.
    """
