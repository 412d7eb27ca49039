"""The error a user can cause and fix, and the one that ends a run."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, configuration or environment. The message is one paragraph: what is wrong, where, and the fix.

    The command line prints it on stderr without a traceback and exits with code 2, before anything was started or
    overwritten.
    """


class RunFailed(RuntimeError):
    """A run ended because of something it can name, like a loss that is no number. Exit code 1, without a traceback.

    The message says where what it saved lies; the last good checkpoint is intact.
    """
