"""What goes wrong, told apart by who can mend it; the command line turns it into exit codes."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A user's mistake; exit code 2. The message names the file or field, what is wrong with it, and the fix."""


class RunFailed(RuntimeError):
    """A run that cannot go on through no mistake in its configuration; its message alone is printed, exit code 1."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing when no candidate is close; upper and lower case count as the same."""
    by_lower_case = {candidate.lower(): candidate for candidate in candidates}
    match = difflib.get_close_matches(name.lower(), by_lower_case, 1)
    return f" Did you mean {by_lower_case[match[0]]!r}?" if match else ""
