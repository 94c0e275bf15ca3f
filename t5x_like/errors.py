"""The one exception that means: the user can mend this. The command line prints its message alone and exits with 2."""


class UserError(ValueError):
    """A user's mistake; the message names the file or field, what is wrong with it, and the fix."""


class RunFailed(RuntimeError):
    """A run that cannot go on through no mistake in its configuration; its message alone is printed, exit code 1."""
