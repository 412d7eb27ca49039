"""Rows of somebody's data, one by one, each with the place it came from: JSONL and Parquet files, sets of the hub.

What a row means is its reader's business: `memento.problem_sets` makes problems of rows, `memento.sft.rows` traces.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from memento.errors import UserError


class Located(NamedTuple):
    """A row, and where it stands: ``train.jsonl, line 3``. What stands there need not be a mapping."""

    where: str
    row: Any


def json_lines(path: Path) -> Iterator[Located]:
    """The values of a JSONL file, compressed if its name ends in ``.gz``; empty lines are skipped.

    Raises:
        UserError: a line that is not JSON, or a file that cannot be read as text.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    with reading(path), opened(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno}).") from error
            except (ValueError, RecursionError) as error:  # a number of more digits than Python reads; nesting
                raise UserError(f"{where}: not JSON that can be read ({error}).") from error
            yield Located(where, value)


def parquet_rows(path: Path) -> Iterator[Located]:
    """The rows of a Parquet file, read a few at a time.

    Raises:
        UserError: it is none, or pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{path}: reading Parquet needs pyarrow, which comes with memento-rl[cpu].") from error
    try:
        with reading(path), ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=256)
            yield from numbered((row for batch in batches for row in batch.to_pylist()), str(path))
    except ArrowException as error:
        raise UserError(f"{path} is no Parquet file: {str(error).splitlines()[0]}.") from error


def numbered(rows: Iterable[Any], where: str) -> Iterator[Located]:
    """Rows of something without lines, counted from 1."""
    for number, row in enumerate(rows, 1):
        yield Located(f"{where}, row {number}", row)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """A file that is not to be had, or not what its name says, becomes a UserError."""
    try:
        yield
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read as {path.suffix or 'JSONL'}: {error}.") from error


@contextmanager
def loading(complaint: str, advice: str) -> Iterator[ModuleType]:
    """The library `datasets`; whatever it raises becomes a UserError: the complaint, its reason, the advice.

    with loading(f"the set {name} cannot be loaded", "Is it spelled right?") as datasets:
        rows = datasets.load_dataset(name, split="train")
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{complaint}: it needs `datasets`, which comes with memento-rl[cpu].") from error
    try:
        yield datasets
    except Exception as error:  # network, licence gate, no such set, subset or split: all end the same way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{complaint}: {reason[:300].rstrip('.')}. {advice}") from error
