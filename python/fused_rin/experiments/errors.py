"""What a user can put right: the command line prints it as one line and exits with code 2."""


class UserError(Exception):
    """A wrong setting, file or folder; the text names it, what was expected and what was found, in one
    line.
    """
