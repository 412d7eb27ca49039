"""Problems with verifiable answers, and how they are read: our own JSONL, or a public set (`memento.problem_sets`).

One line, one problem::

    {"id": "sum-17", "kind": "math", "prompt": "What is the remainder when 47+83 is divided by 100?", "answer": "30"}
    {"id": "echo", "kind": "code", "prompt": "Print the input.", "tests": [{"input": "hi\\n", "output": "hi\\n"}]}
    {"id": "add", "kind": "code", "prompt": "Add.", "entry_point": "add", "tests": [{"args": [1, 2], "expected": 3}]}
    {"id": "add2", "kind": "code", "prompt": "Add.", "tests": [{"program": "assert add(1, 2) == 3"}]}
    {"id": "q1", "kind": "choice", "prompt": "... (A) 1 (B) 2", "answer": "B"}
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from memento.code_sets import python_fault
from memento.errors import UserError
from memento.problem_sets import SetFormat, format_named, read_rows, recognise
from memento.rows import Row, digest


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
    """The function `Problem.entry_point` is called with `args` and must return `expected`, compared as JSON values.

    `alternatives` are further values that are right.
    """

    args: tuple[JsonValue, ...] = ()
    kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    expected: JsonValue
    alternatives: tuple[JsonValue, ...] = ()


class AssertTest(Record):
    """`program` is a Python program that raises if the solution is wrong: ``assert add(1, 2) == 3``.

    It runs in a process of its own, after `setup`. Names that neither defines are the solution's, and so is
    `Problem.entry_point`. Only plain data crosses: numbers, text, lists, tuples, sets, dicts and what they hold.
    """

    program: str
    setup: str = ""


Test = StdioTest | CallTest | AssertTest

TEST_BYTES = 64 << 20
"""Of one test's input, or expected output."""

TESTS_BYTES = 256 << 20
"""Of all tests of a problem together."""


def find_fault(tests: Sequence[Test]) -> str:
    """What is wrong with the tests of a problem, or an empty string: unparsable, contradictory, too large, empty."""
    golds: dict[str, tuple[int, str]] = {}
    total = 0
    for number, test in enumerate(tests, 1):
        if isinstance(test, AssertTest):
            asked, gold = f"{test.setup}\n{test.program}", ""
            if not test.program.strip():
                return f"test {number} is an empty program"
            fault = python_fault(test.program)
            if not fault and (in_setup := python_fault(test.setup)):
                fault = f"in its setup, {in_setup}"
            if fault:
                return f"test {number} is not Python: {fault}"
        elif isinstance(test, StdioTest):
            asked, gold = test.input.rstrip(), test.output.rstrip()
        else:
            asked = json.dumps([test.args, test.kwargs], sort_keys=True)
            gold = json.dumps([test.expected, *test.alternatives], sort_keys=True)
        size = max(len(asked), len(gold))
        total += len(asked) + len(gold)
        if size > TEST_BYTES or total > TESTS_BYTES:
            return (
                f"test {number} is too large: {size:,} characters, {total:,} in all tests so far; "
                f"at most {TEST_BYTES:,} and {TESTS_BYTES:,}"
            )
        earlier, other = golds.setdefault(asked, (number, gold))
        if other != gold:
            return f"tests {earlier} and {number} contradict each other: the same input, different outputs"
    if all(isinstance(test, StdioTest) and not test.output.strip() for test in tests):
        return "no test expects any output, so a program that does nothing passes"
    return ""


class Problem(Record):
    """A prompt with a verifiable answer.

    Attributes:
        id: unique in its file; resume and seeds depend on it.
        kind: which verifier scores it.
        prompt: the user turn, plain text. A special token spelled in it stays plain text.
        answer: for ``math`` LaTeX or text, for ``choice`` a letter.
        tests: for ``code``.
        entry_point: for `CallTest`s, the function that is called, or the method of a class `Solution`.
        prelude: Python that runs before the program, in the same namespace: imports that the set promises.
        time_limit_s, memory_limit_mib: for ``code``, per test.
        source: the data set it came from.
        metadata: anything else; carried along, never read.
    """

    id: str = Field(min_length=1)
    kind: ProblemKind
    prompt: str = Field(min_length=1)
    answer: str | None = None
    tests: tuple[Test, ...] = ()
    entry_point: str | None = None
    prelude: str = ""
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
            fault = find_fault(self.tests)
            if fault:
                raise ValueError(fault)
            if self.prelude and (fault := python_fault(self.prelude)):
                raise ValueError(f"`prelude` is not Python: {fault}")
        elif not (self.answer or "").strip():
            raise ValueError(f"a {self.kind.value} problem needs a non-empty `answer`")
        return self


class LocatedProblem(NamedTuple):
    """A problem, where it stands (``train.jsonl, line 3``), and what its set wants put below the prompt."""

    where: str
    problem: Problem
    instruction: str = ""


class BadProblem(NamedTuple):
    """A row that is no problem: where it stands, and why."""

    where: str
    why: str


def read_located(
    source: str | Path,
    *,
    set_name: str = "auto",
    columns: Mapping[str, str] | None = None,
    kind: str = "math",
    subset: str | None = None,
    split: str | None = None,
) -> Iterator[LocatedProblem | BadProblem]:
    """The problems of a file, folder, known set or hub data set, row by row, with their places.

    Args:
        source: see `memento.problem_sets.read_rows`.
        set_name: whose columns the rows have; ``auto`` recognises it by the columns of the first row.
        columns: for a set that is not known: problem field (``prompt``, ``answer``, ``id``) -> column.
        kind: of problems read by `columns`.
        subset, split: of a hub data set.

    Raises:
        UserError: nothing there, a file that cannot be read, or columns that belong to no known set.
    """
    known: SetFormat | None = None
    for where, row in read_rows(source, subset=subset, split=split):
        if known is None:
            known = _named_columns(columns, kind) if columns else _known_format(set_name, where, row)
        try:
            problem = Problem.model_validate(known.fields(row))
        except ValidationError as error:
            yield BadProblem(where, explain(error))
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # the row is somebody else's data
            why = f"no column {error}" if isinstance(error, KeyError) else str(error)
            yield BadProblem(where, f"no {known.name} problem: {why}")
        else:
            yield LocatedProblem(where, problem, known.instruction)


def load_problems(path: str | Path, *, limit: int | None = None) -> list[Problem]:
    """Read problems from a file, a folder, a known set (``"gsm8k"``) or a hub data set, as `read_located`.

    What a configuration can ask for beyond that (other columns, exclusion, leaving out bad rows) is
    `memento.sources.load`.

    Args:
        limit: read at most this many.

    Raises:
        UserError: no such file, a line that is not JSON, a row that lacks a field or has an unknown one, or a repeated
            id. The message names the file and the line.
    """
    problems: list[Problem] = []
    for item in read_located(path):
        if limit is not None and len(problems) >= limit:
            break
        if isinstance(item, BadProblem):
            raise UserError(f"{item.where}: {item.why}.")
        problems.append(with_instruction(item.problem, item.instruction))
    if not problems:
        raise UserError(f"{path} holds no problems.")
    repeated = [i for i, n in Counter(problem.id for problem in problems).items() if n > 1]
    if repeated:
        raise UserError(f"{path}: the id {repeated[0]!r} occurs more than once; every problem needs its own.")
    return problems


def with_instruction(problem: Problem, instruction: str) -> Problem:
    """The problem with a sentence below its prompt; the problem itself where that is empty."""
    if not instruction:
        return problem
    return problem.model_copy(update={"prompt": f"{problem.prompt.rstrip()}\n\n{instruction}"})


def _known_format(set_name: str, where: str, row: Row) -> SetFormat:
    if set_name != "auto":
        return format_named(set_name, row)
    known = recognise(row) or (format_named("problems", row) if "kind" in row else None)
    if known is None:
        raise UserError(
            f"{where}: the columns {', '.join(map(str, row))} belong to no known problem set. Our own have id, kind, "
            "prompt and answer or tests; others are named by `problems.set`, or their columns by `problems.columns`."
        )
    return known


def _named_columns(columns: Mapping[str, str], kind: str) -> SetFormat:
    def fields(row: Row) -> dict[str, object]:
        prompt, answer = str(row[columns["prompt"]]), row[columns["answer"]]
        own = row.get(columns["id"]) if "id" in columns else None
        given = "" if answer is None else str(answer)
        return {"id": str(own or digest(prompt)), "kind": kind, "prompt": prompt, "answer": given}

    return SetFormat("columns", frozenset(columns.values()), fields)


def save_problems(problems: Iterable[Problem], path: str | Path) -> None:
    """Write problems as JSONL, so that `load_problems` gives them back."""
    with Path(path).open("w", encoding="utf-8") as file:
        for problem in problems:
            file.write(problem.model_dump_json(exclude_defaults=True) + "\n")


def explain(error: ValidationError) -> str:
    """The first few complaints of a pydantic error in one sentence each: field, what is wrong."""
    parts = []
    for complaint in error.errors()[:3]:
        field = ".".join(str(part) for part in complaint["loc"])
        parts.append(f"{field}: {complaint['msg']}" if field else complaint["msg"].removeprefix("Value error, "))
    return "; ".join(parts)
