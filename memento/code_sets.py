"""Public sets of programming problems: how a row becomes the fields of a `Problem`.

| set | tests become |
|---|---|
| HumanEval | one assert program: the set's ``check``, with the prompt's own helpers as its set-up |
| MBPP | one assert program for each line of ``test_list`` |
| LiveCodeBench | stdin and stdout, or calls with expected values; public and hidden ones |
| APPS, TACO | stdin and stdout, or calls with expected values |

A row that is no problem raises `BadRow` with the reason; whoever reads the file adds its name and line. Nothing in a
row is run or unpickled here.
"""

from __future__ import annotations

import ast
import base64
import json
import pickletools
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from memento.rows import BadRow, Fields, Row, digest, text_of

UNPACKED_BYTES = 256 << 20
"""Hidden tests of one problem, unpacked. More is a decompression bomb, or no use for training."""

ANSWER = "Answer with one complete Python program in a ```python fence."

LEETCODE_PRELUDE = """\
import bisect, collections, copy, datetime, functools, heapq, itertools, json, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from operator import *
from typing import *
from builtins import *
"""
"""What the sites with function tests import before a solution runs."""


def human_eval(row: Row) -> Fields:
    """``task_id``, ``prompt`` (a stub), ``test`` (a function ``check``), ``entry_point``. Also HumanEval+."""
    name, stub, test = text_of(row, "entry_point"), text_of(row, "prompt"), text_of(row, "test")
    if not re.search(r"^def\s+check\b", test, re.MULTILINE):
        raise BadRow("its test defines no function `check`")
    helpers = stub if is_python(stub) else ""
    return {
        "id": text_of(row, "task_id"),
        "kind": "code",
        "prompt": f"Complete this Python function. {ANSWER}\n\n```python\n{stub.rstrip()}\n```",
        "tests": [{"setup": helpers, "program": f"{test.strip()}\n\ncheck({name})\n"}],
        "entry_point": name,
        "prelude": helpers,
        "source": "humaneval",
    }


def mbpp(row: Row) -> Fields:
    """``task_id``, ``text`` or ``prompt``, ``test_list`` (asserts), ``test_setup_code`` or ``test_imports``."""
    tests = row.get("test_list")
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        raise BadRow("test_list is empty")
    imports = row.get("test_imports")
    lines = [str(line) for line in imports] if isinstance(imports, Sequence) and not isinstance(imports, str) else []
    setup = "\n".join([*lines, str(row.get("test_setup_code") or "")]).strip()
    shown = "\n".join(str(test).strip() for test in tests)
    return {
        "id": f"mbpp/{text_of(row, 'task_id')}",
        "kind": "code",
        "prompt": f"{text_of(row, 'prompt', 'text').strip()} {ANSWER} It must pass these tests:\n\n{shown}",
        "tests": [{"setup": setup, "program": str(test)} for test in tests],
        "entry_point": _tested_function(str(row.get("code") or ""), shown),
        "source": "mbpp",
    }


def _tested_function(solution: str, tests: str) -> str | None:
    """The last function of a set's own solution that its tests call. Some have the name of a built-in one: ``sum``."""
    if not is_python(solution) or not is_python(tests):
        return None
    called = {
        node.func.id
        for node in ast.walk(_tree(tests))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    defined = [node.name for node in _tree(solution).body if isinstance(node, ast.FunctionDef) and node.name in called]
    return defined[-1] if defined else None


def livecodebench(row: Row) -> Fields:
    """``question_content``, ``public_test_cases``, ``private_test_cases``, ``starter_code``, ``metadata.func_name``."""
    tests = [*_test_cases(row, "public_test_cases"), *_test_cases(row, "private_test_cases")]
    if not tests:
        raise BadRow("no test cases")
    starter = str(row.get("starter_code") or "").rstrip()
    functional = [test.get("testtype") == "functional" for test in tests]
    name = None
    if any(functional):
        metadata = row.get("metadata") or {}
        metadata = _json(metadata, "metadata") if isinstance(metadata, str) else metadata
        name = metadata.get("func_name") or _only_method(starter)
        if not name:
            raise BadRow("function-call tests, but neither metadata.func_name nor one method in starter_code")
    ask = f"Write it into this code:\n\n```python\n{starter}\n```\n\n" if starter else "Read stdin, write stdout. "
    return {
        "id": f"livecodebench/{text_of(row, 'question_id')}",
        "kind": "code",
        "prompt": f"{text_of(row, 'question_content').strip()}\n\n{ask}{ANSWER}",
        "tests": [
            _livecodebench_test(n, test, call) for n, (test, call) in enumerate(zip(tests, functional, strict=True), 1)
        ],
        "entry_point": name,
        "prelude": LEETCODE_PRELUDE if name else "",
        "source": "livecodebench",
        "metadata": {c: row[c] for c in ("difficulty", "platform", "contest_date") if isinstance(row.get(c), str)},
    }


def apps(row: Row) -> Fields:
    """APPS and TACO: ``question``, ``input_output`` (JSON: ``inputs``, ``outputs``, perhaps ``fn_name``)."""
    packed = row.get("input_output")
    tests = _json(packed, "input_output") if isinstance(packed, str) else packed
    if not isinstance(tests, Mapping):
        raise BadRow("input_output holds no tests")
    inputs, outputs = tests.get("inputs") or [], tests.get("outputs") or []
    if not inputs or len(inputs) != len(outputs):
        raise BadRow(f"{len(inputs)} inputs and {len(outputs)} outputs")
    question, starter, name = (
        text_of(row, "question"),
        str(row.get("starter_code") or "").rstrip(),
        tests.get("fn_name"),
    )
    source = "apps" if row.get("problem_id") is not None else "taco"
    own = next((str(row[c]) for c in ("problem_id", "id") if row.get(c) not in (None, "")), None)
    ask = f"Start from:\n\n```python\n{starter}\n```\n\n" if starter else ""
    if not name:
        ask += "Read stdin, write stdout. "
    pairs = list(zip(inputs, outputs, strict=True))
    return {
        "id": f"{source}/{own or digest(question)}",
        "kind": "code",
        "prompt": f"{question.strip()}\n\n{ask}{ANSWER}",
        "tests": [_apps_call(n, i, o) for n, (i, o) in enumerate(pairs, 1)]
        if name
        else [{"input": _lines(i), "output": _lines(o)} for i, o in pairs],
        "entry_point": name,
        "prelude": LEETCODE_PRELUDE if name else "",
        **_limits(row),
        "source": source,
        "metadata": {"difficulty": row["difficulty"]} if isinstance(row.get("difficulty"), str) else {},
    }


def reference_program(row: Row) -> str:
    """The set's own solution of a row, to try its tests with.

    Raises:
        BadRow: it has none.
    """
    if row.get("canonical_solution"):
        return f"{row['prompt']}{row['canonical_solution']}"
    if row.get("code"):
        return str(row["code"])
    solutions = row.get("solutions")
    solutions = _json(solutions, "solutions") if isinstance(solutions, str) and solutions.strip() else solutions
    if isinstance(solutions, Sequence) and not isinstance(solutions, str) and solutions:
        return str(solutions[0])
    raise BadRow("no solution")


def is_python(source: str) -> bool:
    """Whether it compiles."""
    return not python_fault(source)


def python_fault(source: str) -> str:
    """Why a text is not Python, or an empty string."""
    try:
        _tree(source)
    except SyntaxError as error:
        return f"line {error.lineno}: {error.msg}"
    except (ValueError, RecursionError, MemoryError) as error:
        return str(error) or "nested too deep"
    return ""


def _tree(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the source's own: '\d' and its like
        return ast.parse(source)


def _livecodebench_test(number: int, test: Row, call: bool) -> Fields:
    for field in ("input", "output"):
        if not isinstance(test.get(field), str):
            raise BadRow(f"test {number} has no {field}")
    if not call:
        return {"input": test["input"], "output": test["output"]}
    lines = [line for line in test["input"].split("\n") if line.strip()]
    return {
        "args": [_json(line, f"test {number}, an argument") for line in lines],
        "expected": _json(test["output"], f"test {number}, the expected value"),
    }


def _test_cases(row: Row, column: str) -> list[Row]:
    """JSON; or, for hidden tests, JSON in a pickled string, in zlib, in base64."""
    packed = row.get(column)
    if not packed:
        return []
    if isinstance(packed, str):
        text = packed if packed.lstrip()[:1] in ("[", "{") else _unpacked(packed, column)
        packed = _json(text, column)
    if not isinstance(packed, list) or not all(isinstance(test, Mapping) for test in packed):
        raise BadRow(f"{column} is no list of tests")
    return packed


def _unpacked(packed: str, column: str) -> str:
    try:
        compressed = base64.b64decode(packed, validate=True)
        stream = zlib.decompressobj()
        data = stream.decompress(compressed, UNPACKED_BYTES)
    except (ValueError, zlib.error) as error:
        raise BadRow(f"{column} is neither JSON nor base64 of zlib: {error}") from error
    if stream.unconsumed_tail:
        raise BadRow(f"{column} is larger than {UNPACKED_BYTES >> 20} MiB unpacked")
    if not stream.eof:
        raise BadRow(f"{column} is cut off")
    return pickled_text(data) if data[:1] == b"\x80" else data.decode("utf-8")


_HARMLESS = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "STOP"}
_TEXT = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}


def pickled_text(data: bytes) -> str:
    """The string that a pickle holds, read opcode by opcode: a pickle of anything else is refused, not loaded.

    Raises:
        BadRow: it is not the pickle of one string.
    """
    texts: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in _TEXT:
                texts.append(str(argument))
            elif opcode.name not in _HARMLESS:
                raise BadRow(f"its hidden tests are a pickle with {opcode.name}; only a pickled string is read")
    except BadRow:
        raise
    except (ValueError, IndexError, OverflowError) as error:
        raise BadRow("its hidden tests are no pickle") from error
    if len(texts) != 1:
        raise BadRow(f"its hidden tests are a pickle of {len(texts)} strings, not of one")
    return texts[0]


def _apps_call(number: int, arguments: object, output: object) -> Fields:
    if not isinstance(arguments, list):
        raise BadRow(f"test {number}: the arguments of a call are a list, not {str(arguments)[:60]!r}")
    if isinstance(output, list) and len(output) == 1:  # some rows wrap the value in a list, some mean the list
        return {"args": arguments, "expected": output[0], "alternatives": [output]}
    return {"args": arguments, "expected": output}


def _limits(row: Row) -> Fields:
    """TACO's ``time_limit`` ("2.0 seconds") and ``memory_limit`` ("256.0 megabytes"), where above our defaults."""
    limits: Fields = {}
    for column, field, least in (("time_limit", "time_limit_s", 4.0), ("memory_limit", "memory_limit_mib", 512)):
        match = re.match(r"\s*(\d+(?:\.\d+)?)\s*(seconds?|megabytes?)\b", str(row.get(column) or ""))
        if match and float(match[1]) > least:
            limits[field] = type(least)(float(match[1]))
    return limits


def _only_method(starter: str) -> str | None:
    names = [name for name in re.findall(r"^\s*def\s+(\w+)", starter, re.MULTILINE) if not name.startswith("__")]
    return names[0] if len(names) == 1 else None


def _lines(value: object) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"{what} is not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of more digits than Python reads; nesting
        raise BadRow(f"{what} is not JSON that can be read ({error})") from error
