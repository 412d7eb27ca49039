"""Rows of somebody else's data, and what every format does with them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]
Fields = dict[str, Any]
"""Of a `Problem`, not yet validated."""


class BadRow(ValueError):
    """A row that is no problem. The message says why, without the place."""


def digest(text: str) -> str:
    """Eight hex bytes of a text: an id for rows that have none, the same wherever the row stands."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()


def text_of(row: Row, *columns: str) -> str:
    """The first of these columns that holds something, as text. Raises BadRow if none does."""
    for column in columns:
        value = row.get(column)
        if value is not None and str(value).strip():
            return str(value)
    raise BadRow(f"no {' or '.join(columns)}")
