r"""The final ``\boxed{...}`` of a text: where answer keys and completions alike keep the final answer."""

from __future__ import annotations

import re
from typing import NamedTuple

_BOX_OR_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s+([^\s{}$\\]{1,200})")
_JOINT = re.compile(
    r"(?:[\s,;$&]|\\[()\[\],;: ]|\\(?:text|mbox|mathrm)\{\s*(?:,?\s*(?:and|or)|,)\s*\}"
    r"|\\(?:quad|qquad)|\b(?:and|or)\b)*"
)
"""What may stand between boxes that form one answer together: ``\boxed{1} \text{ and } \boxed{2}``."""

JOINT_CHARS = 60
"""Boxes further apart than this are separate answers, whatever stands between them."""


class _Box(NamedTuple):
    opens: int
    closes: int
    text: str


def last_boxed(text: str) -> str | None:
    r"""The answer in the last box: content of the closed, non-empty ``\boxed{...}`` that opens last.

    Braces nest, and ``\{`` does not count. ``\boxed{\boxed{3}}`` gives ``3``; a box cut off by the length limit is not
    an answer. Also ``\fbox{}`` and the brace-less ``\boxed 3``. Boxes joined by nothing but "and", "or" and commas are
    one answer, a list: ``\boxed{1} and \boxed{2}`` gives ``1, 2``. Linear in the length of the text.
    """
    boxes = _boxes(text)
    if not boxes:
        bare = [match[1].rstrip(".,;") for match in _BARE_BOX.finditer(text)]
        return (bare[-1] or None) if bare else None
    last = boxes[-1]
    parts = [last.text]
    for box in reversed(boxes[:-1]):
        between = text[box.closes + 1 : last.opens] if box.closes < last.opens <= box.closes + 1 + JOINT_CHARS else None
        if between is None or not _JOINT.fullmatch(between) or not re.search(r"and|or|,|;", between):
            break
        last = box
        parts.append(box.text)
    return ", ".join(dict.fromkeys(reversed(parts)))


def _boxes(text: str) -> list[_Box]:
    """Closed boxes with something in them, in the order in which they open; of nested ones the innermost."""
    open_braces: list[tuple[int, int] | None] = []  # where a box and its content start; None for a plain brace
    found: list[_Box] = []
    for match in _BOX_OR_BRACE.finditer(text):
        token = match.group()
        if match["box"]:
            open_braces.append((match.start(), match.end()))
        elif token == "{":
            open_braces.append(None)
        elif token == "}" and open_braces:
            box = open_braces.pop()
            inner = text[box[1] : match.start()].strip() if box is not None else ""
            # A box that holds another one closes after it: the inner one is the answer.
            if box is not None and inner and (not found or found[-1].opens < box[0]):
                found.append(_Box(box[0], match.start(), inner))
    return found
