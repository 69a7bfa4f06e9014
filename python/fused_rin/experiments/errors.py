"""What a user can put right: the command line prints it as one line and exits with code 2."""

INTERRUPTED = 130  # the exit code a shell gives a process that Ctrl-C ended
CLOSED = 141  # and one whose output was closed


class UserError(Exception):
    """A wrong setting, file or folder; the text names it, what was expected and what was found, in one line."""
