"""Finding the program in a completion."""

from __future__ import annotations

import re
from typing import NamedTuple

from memento.rewards.answers import visible_answer_text

PROGRAM_CHARS = 1 << 20
"""A longer program is not run: no answer is, and compiling one takes longer than a test may."""


class Program(NamedTuple):
    """The source that is run; or, where it is None, why there is none."""

    source: str | None
    missing: str = ""


_OPEN = re.compile(r"[ \t]{0,8}(`{3,}|~{3,})[ \t]*\{?[ \t]*\.?([\w+#.-]{0,40})[^`]{0,200}")
_PYTHON = {"python", "python3", "py", "py3"}


def find_program(completion: str) -> Program:
    """The last closed fence labelled python; without any labelled fence, the last unlabelled one.

    Several fences are usual (drafts, usage examples), the last one is the answer. A fence that the length limit cut off
    is no answer, and a program in another language is not one either.
    """
    fences: list[tuple[str, str]] = []
    mark, label, body = "", "", list[str]()
    for line in visible_answer_text(completion).split("\n"):
        line = line.removesuffix("\r")
        if mark:
            bare = line.strip()
            if bare[:3] == mark[:3] and len(bare) >= len(mark) and set(bare) == {mark[0]}:
                fences.append((label, "\n".join(body) + "\n"))
                mark = ""
            else:
                body.append(line)
        elif match := _OPEN.fullmatch(line):
            mark, label, body = match[1], match[2].lower(), []
    labels = {label for label, _ in fences if label}
    wanted = _PYTHON if labels else {""}
    programs = [text for label, text in fences if label in wanted and text.strip()]
    if programs and len(programs[-1]) > PROGRAM_CHARS:
        return Program(None, f"a program of {len(programs[-1]):,} characters, more than {PROGRAM_CHARS:,}")
    if programs:
        return Program(programs[-1])
    if mark:
        return Program(None, f"the ``` fence{f' of {label}' if label else ''} is not closed")
    if labels and not labels & _PYTHON:
        return Program(None, f"fences of {', '.join(sorted(labels))[:80]}, none of python")
    return Program(None, "an empty ``` fence" if fences else "no ```python fence")
