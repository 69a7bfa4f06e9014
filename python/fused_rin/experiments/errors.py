"""What a user can put right: the command line prints it as one line and exits with code 2."""

import os
import sys

INTERRUPTED = 130  # the exit code a shell gives a process that Ctrl-C ended
CLOSED = 141  # and one whose output was closed


class UserError(Exception):
    """A wrong setting, file or folder; the text names it, what was expected and what was found, in one line."""


def drop_output() -> None:
    """After stdout has refused something: what is still in its buffer would be refused again as the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
