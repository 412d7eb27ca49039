"""Problems with verifiable answers, and how they are read from JSONL.

One line, one problem::

    {"id": "sum-17", "kind": "math", "prompt": "What is the remainder when 47+83 is divided by 100?", "answer": "30"}
    {"id": "echo", "kind": "code", "prompt": "Print the input.", "tests": [{"input": "hi\\n", "output": "hi\\n"}]}
    {"id": "q1", "kind": "choice", "prompt": "... (A) 1 (B) 2", "answer": "B"}
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from memento.errors import UserError


class Record(BaseModel):
    """A frozen record that goes to JSONL and across processes as it is. Unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ProblemKind(StrEnum):
    """Which verifier scores a problem."""

    MATH = "math"
    CODE = "code"
    CHOICE = "choice"


class StdioTest(Record):
    """A program is run with `input` on stdin and must print `output` (trailing white space is ignored)."""

    input: str
    output: str


class CallTest(Record):
    """The function `Problem.entry_point` is called with `args` and must return `expected`, compared as JSON values."""

    args: tuple[JsonValue, ...] = ()
    kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    expected: JsonValue


class Problem(Record):
    """A prompt with a verifiable answer.

    Attributes:
        id: unique in its file; resume and seeds depend on it.
        kind: which verifier scores it.
        prompt: the user turn, plain text. A special token spelled in it stays plain text.
        answer: for ``math`` LaTeX or text, for ``choice`` a letter.
        tests: for ``code``.
        entry_point: for `CallTest`s, the function that is called.
        time_limit_s, memory_limit_mib: for ``code``, per test.
        source: the data set it came from.
        metadata: anything else; carried along, never read.
    """

    id: str = Field(min_length=1)
    kind: ProblemKind
    prompt: str = Field(min_length=1)
    answer: str | None = None
    tests: tuple[StdioTest | CallTest, ...] = ()
    entry_point: str | None = None
    language: str = "python"
    time_limit_s: float = Field(default=4.0, gt=0)
    memory_limit_mib: int = Field(default=512, gt=0)
    source: str = ""
    metadata: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_a_gold(self) -> Self:
        if self.kind is ProblemKind.CODE:
            if not self.tests:
                raise ValueError("a code problem needs `tests`")
            if any(isinstance(test, CallTest) for test in self.tests) and not self.entry_point:
                raise ValueError("function-call tests need `entry_point`, the name of the function")
        elif not (self.answer or "").strip():
            raise ValueError(f"a {self.kind.value} problem needs a non-empty `answer`")
        return self


def load_problems(path: str | Path, *, limit: int | None = None) -> list[Problem]:
    """Read problems from a JSONL file.

    Args:
        path: the file; empty lines are skipped.
        limit: read at most this many.

    Raises:
        UserError: no such file, a line that is not JSON, lacks a field or has an unknown one, or a repeated id. The
            message names the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no problem file at {path}. `--problems` and `data.problems` take a JSONL file.")
    problems: list[Problem] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(problems) >= limit:
                break
            if line.strip():
                problems.append(_parse_line(line, f"{path}, line {number}"))
    if not problems:
        raise UserError(f"{path} holds no problems.")
    repeated = [i for i, n in Counter(problem.id for problem in problems).items() if n > 1]
    if repeated:
        raise UserError(f"{path}: the id {repeated[0]!r} occurs more than once; every problem needs its own.")
    return problems


def save_problems(problems: Iterable[Problem], path: str | Path) -> None:
    """Write problems as JSONL, so that `load_problems` gives them back."""
    with Path(path).open("w", encoding="utf-8") as file:
        for problem in problems:
            file.write(problem.model_dump_json(exclude_defaults=True) + "\n")


def _parse_line(line: str, where: str) -> Problem:
    try:
        return Problem.model_validate(json.loads(line))
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno}).") from error
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error)}.") from error


def explain(error: ValidationError) -> str:
    """The first few complaints of a pydantic error in one sentence each: field, what is wrong."""
    parts = []
    for complaint in error.errors()[:3]:
        field = ".".join(str(part) for part in complaint["loc"])
        parts.append(f"{field}: {complaint['msg']}" if field else complaint["msg"].removeprefix("Value error, "))
    return "; ".join(parts)
