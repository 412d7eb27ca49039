"""The program in a completion."""

import time

import pytest

from memento.rewards.programs import PROGRAM_CHARS, find_program

FENCE = "```python\nprint(1)\n```"


@pytest.mark.parametrize(
    ("text", "source"),
    [
        (FENCE, "print(1)\n"),
        ("```py\na\n```\nthen\n```Python3\nb\n```", "b\n"),
        (FENCE + "\nExample output:\n```text\n1\n```", "print(1)\n"),
        ("```\nprint(2)\n```", "print(2)\n"),
        ("```\ndraft\n```\n" + FENCE + "\n```\n1\n```", "print(1)\n"),
        ("~~~python\nprint(3)\n~~~", "print(3)\n"),
        ("````python\n'''\n```\nx\n```\n'''\n````", "'''\n```\nx\n```\n'''\n"),
        ("  ```python title=a.py\n  print(4)\n  ```", "  print(4)\n"),
        ("```{.python}\nprint(5)\n```", "print(5)\n"),
        ("```python\r\nprint(6)\r\n```\r\n", "print(6)\n"),
    ],
)
def test_which_program_is_run(text: str, source: str):
    assert find_program(text) == (source, "")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<think>" + FENCE + "</think>done", "no ```python fence"),
        ("print(1)", "no ```python fence"),
        ("", "no ```python fence"),
        ("```cpp\nint main() {}\n```", "fences of cpp, none of python"),
        ("```c++\nint main() {}\n```\n```text\n1\n```", "fences of c++, text"),
        ("```python\nprint(1)", "the ``` fence of python is not closed"),
        ("```\nprint(1)", "the ``` fence is not closed"),
        ("```python\n\n```", "an empty ``` fence"),
        ("```python\n" + "#" * PROGRAM_CHARS + "\n```", "more than 1,048,576"),
        ("\x00" * 1000, "no ```python fence"),
    ],
)
def test_why_there_is_none(text: str, why: str):
    program = find_program(text)
    assert program.source is None
    assert why in program.missing


@pytest.mark.parametrize(
    "text",
    [
        "```python\n" * 100_000,
        "`" * 1_000_000,
        "```python\nx\n```\n" * 60_000,
        "\n" * 1_000_000,
        "~~~\n```\n" * 120_000,
        "``` " + "x" * 1_000_000,
        "```\ud800\n" * 200_000,
        " " * 1_000_000,
        "```python" + " " * 1_000_000,
    ],
    ids=range(9),
)
def test_a_megabyte_of_anything_is_read_in_linear_time(text: str):
    start = time.process_time()
    find_program(text)
    assert time.process_time() - start < 3.0
