"""The error a user can cause and fix, the one that ends a run, and the one of a full disk."""

from __future__ import annotations

import errno


class UserError(Exception):
    """Bad input, configuration or environment. The message is one paragraph: what is wrong, where, and the fix.

    The command line prints it on stderr without a traceback and exits with code 2, before anything was started or
    overwritten.
    """


class RunFailed(RuntimeError):
    """A run ended because of something it can name, like a loss that is no number. Exit code 1, without a traceback.

    The message says where what it saved lies; the last good checkpoint is intact.
    """


def disk_is_full(error: BaseException) -> bool:
    """Whether a write was refused because the disk, or the user's share of it, is full.

    safetensors has an error of its own for it.
    """
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error)
