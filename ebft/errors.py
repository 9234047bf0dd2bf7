"""The one exception for bad input, whose message is written for the person at the keyboard."""


class UsageError(ValueError):
    """Bad input from the user.

    The message repeats the user's own key, value or shape, says what was expected and how to mend it.
    The command line prints it alone, without a traceback, and exits with code 2.

    Attributes:
        told: another process of the same run has already said so.
    """

    told = False


def flag(option: str) -> str:
    """An option as the user types it: `max_grad_norm` is ``--max-grad-norm``."""
    return f"--{option.replace('_', '-')}"
