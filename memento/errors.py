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


def full_disk_message(error: BaseException, way_out: str) -> str:
    """What a user is told when `disk_is_full`: where, if the error knows, and what to do after making room."""
    file = getattr(error, "filename", None)
    where = f" ({file})" if file else ""
    return f"failed: the disk is full{where}. Make room, {way_out}"
