"""The one error a user can cause and fix."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, configuration or environment. The message is one paragraph: what is wrong, where, and the fix.

    The command line prints it on stderr without a traceback and exits with code 2, before anything was started or
    overwritten.
    """
