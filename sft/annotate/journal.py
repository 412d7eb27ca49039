"""What the endpoint answered, on disk before anything is done with it: a killed run asks nothing twice.

One JSON line an answer, in one ``write`` to a file opened for appending, so that a process killed at any moment leaves
whole lines and at most one broken last line, which is cut off when the file is opened again.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memento.errors import UserError


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of the endpoint.

    Attributes:
        text: what the model wrote.
        finish_reason: ``stop``, ``length``, ...
        prompt_tokens, completion_tokens: as the endpoint counted them, 0 where it does not say.
        seconds: from the request to the whole answer, without earlier attempts that failed.
        failures: attempts before it that brought no answer.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    failures: int


def request_key(request: dict[str, Any]) -> str:
    """The name under which the answer to a request is remembered: a hash of everything that is sent."""
    return hashlib.blake2b(json.dumps(request, sort_keys=True).encode(), digest_size=16).hexdigest()


class Journal:
    """The answers so far, in memory and in one append-only file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Answer] = {}
        for row in read_lines(path):
            key = row.pop("key")
            self.answers[key] = Answer(**row)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def add(self, key: str, answer: Answer) -> None:
        """Remember an answer. When this returns, a kill cannot lose it."""
        append_line(self._file, {"key": key, **asdict(answer)})
        self.answers[key] = answer

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def append_line(file: int, row: dict[str, Any]) -> None:
    """Append one JSON line to an open file descriptor, in one write."""
    data = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    written = os.write(file, data)
    if written != len(data):  # a full disk; the broken line is cut off at the next start
        raise OSError(f"only {written} of {len(data)} bytes could be written; is the disk full?")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of an append-only file; a broken last line is cut off the file.

    Raises:
        UserError: a broken line that is not the last: the file was not written by this program.
    """
    if not path.is_file():
        return []
    rows, whole = [], 0
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("no end of line")
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(
                    f"{path}, line {number} is no JSON: the file is damaged. Move it away to start again."
                ) from error
            os.truncate(path, whole)
            break
        whole += len(line)
    return rows
