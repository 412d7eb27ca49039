"""The prompts, one file each: the system message, a line of dashes, the user message with ``{fields}``."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from memento.sft.annotate.endpoint import Malformed

_BACKSLASH = re.compile(r"\\(.)", re.DOTALL)
FOLDER = Path(__file__).parent / "prompts"


@cache
def _read(name: str, folder: Path) -> tuple[str, str]:
    system, _, user = (folder / f"{name}.md").read_text(encoding="utf-8").partition("\n---\n")
    return system.strip(), user.strip()


def render(name: str, folder: Path = FOLDER, **fields: Any) -> tuple[str, str]:
    """(system, user) messages of ``<folder>/<name>.md`` with its fields filled in."""
    system, user = _read(name, folder)
    return system, user.format(**fields)


def read_object(text: str) -> dict[str, Any]:
    """The JSON object in an answer; thinking before it, code fences and words around it are ignored.

    Raises:
        Malformed: there is none.
    """
    text = strip_thinking(text)
    start = text.find("{")
    if start < 0:
        raise Malformed("no JSON object")
    try:
        value, _ = json.JSONDecoder().raw_decode(_BACKSLASH.sub(_escape, text[start:]))
    except json.JSONDecodeError as error:
        raise Malformed(f"broken JSON ({error.msg})") from error
    if not isinstance(value, dict):
        raise Malformed("no JSON object")
    return value


def _escape(match: re.Match[str]) -> str:
    """Double a backslash that is no escape of JSON: a model forgot to, in its LaTeX."""
    return match.group() if match.group(1) in '"\\/bfnrtu' else "\\" + match.group()


def strip_thinking(text: str) -> str:
    """An answer without the reasoning that a thinking model puts before it."""
    return text.rpartition("</think>")[2].strip()
