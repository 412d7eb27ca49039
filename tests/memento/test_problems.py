"""Problem files: what loads, and errors that name file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memento.errors import UserError
from memento.problems import CallTest, Problem, ProblemKind, StdioTest, load_problems, save_problems

SUM = {"id": "sum-1", "kind": "math", "prompt": "1 + 1?", "answer": "2"}


def write(folder: Path, *lines: object) -> Path:
    file = folder / "problems.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return file


def test_round_trip_of_every_kind(tmp_path: Path) -> None:
    problems = [
        Problem(id="m", kind=ProblemKind.MATH, prompt="x = ?", answer="\\frac{1}{2}", metadata={"level": 3}),
        Problem(id="c", kind=ProblemKind.CHOICE, prompt="A or B?", answer="B", source="quiz"),
        Problem(id="s", kind=ProblemKind.CODE, prompt="echo", tests=(StdioTest(input="1\n", output="1\n"),)),
        Problem(
            id="f",
            kind=ProblemKind.CODE,
            prompt="add",
            entry_point="add",
            tests=(CallTest(args=(1, [2, {"a": None}]), kwargs={"k": "ä"}, expected=3.5),),
        ),
    ]
    save_problems(problems, tmp_path / "p.jsonl")
    assert load_problems(tmp_path / "p.jsonl") == problems
    assert load_problems(tmp_path / "p.jsonl", limit=2) == problems[:2]


def test_empty_lines_are_skipped(tmp_path: Path) -> None:
    assert len(load_problems(write(tmp_path, "", SUM, "   ", {**SUM, "id": "b"}))) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "not JSON"),
        ("[1]", "line 2"),
        ({"id": "x", "kind": "math", "answer": "2"}, "prompt: Field required"),
        ({**SUM, "id": "b", "answer": "  "}, "non-empty `answer`"),
        ({**SUM, "id": "b", "kind": "essay"}, "kind"),
        ({**SUM, "id": "b", "hint": "2"}, "hint: Extra inputs"),
        ({**SUM, "id": ""}, "id"),
        ({"id": "b", "kind": "code", "prompt": "p"}, "needs `tests`"),
        ({"id": "b", "kind": "code", "prompt": "p", "tests": [{"args": [1], "expected": 1}]}, "entry_point"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    file = write(tmp_path, SUM, line)
    with pytest.raises(UserError, match=message) as caught:
        load_problems(file)
    assert f"{file}, line 2" in str(caught.value)


def test_repeated_ids_no_file_and_no_problems(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'sum-1' occurs more than once"):
        load_problems(write(tmp_path, SUM, SUM))
    with pytest.raises(UserError, match="no problem file at"):
        load_problems(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="holds no problems"):
        load_problems(write(tmp_path, ""))
