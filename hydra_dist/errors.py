"""The two errors that a user meets without a traceback.

Everything else that is raised is a bug of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Base of the errors that are shown as one message; ``exit_code`` is what the process ends with."""

    exit_code = 1


class ConfigError(UserError):
    """The configuration or the command line asks for something that cannot work: found before anything is started.

    The message names the file and key, the value, what is allowed, and a setting that works.
    """

    exit_code = 2


class RunError(UserError):
    """The run met something that it cannot go on with: a corrupt shard or checkpoint, a full disk, a lost peer."""

    exit_code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean "x"?)`` for the known name closest to ``name``, or an empty string where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""
